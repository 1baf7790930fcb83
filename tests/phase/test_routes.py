"""/api/migration: who may, what is looked at, what is refused and kept, what is asked for."""

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from openapi_spec_validator import OpenAPIV31SpecValidator

from sidecar.api import openapi
from sidecar.api.body import Budget
from sidecar.api.guard import Guard
from sidecar.api.migration import STEPS, Migration
from sidecar.api.tokens import TokenFile
from sidecar.canary import CanaryOutcome
from sidecar.clock import SystemClock
from sidecar.fleet import Finding
from sidecar.phase import Phase
from sidecar.plan import Asked, Plan, Wanted, way
from sidecar.settings import MIB, Settings
from tests.api.door import Door, open_door

SQL, DUAL, READ, DYNAMO = Phase
TOKEN = "phase-token"
POSTS = [*STEPS, "rollback", "test-dual-write"]


class Control:
    """Plays the deciding part: what the gates say, and what was asked of it."""

    def __init__(self) -> None:
        self.authority = "api"
        self.applied = SQL
        self.red: tuple[str, ...] = ()
        self.asked: list[Wanted] = []
        self.turned_down: list[tuple[Wanted, tuple[str, ...]]] = []
        self.outcomes = [CanaryOutcome("postgres", "", 0.01), CanaryOutcome("dynamodb", "", 0.02)]

    def state(self) -> dict[str, object]:
        return {"applied": self.applied.label, "holds": []}

    async def fleet(self) -> dict[str, object]:
        return {"enabled": True, "instances": [], "unreachable": {}}

    async def history(self, limit: int) -> list[dict[str, object]]:
        return [{"why": str(limit)}]

    async def plan(self, target: Phase | None) -> Plan:
        wanted = self.applied if target is None else target
        findings = tuple(Finding(name, False, "7", "0", 1) for name in self.red)
        green = Finding("green", True, "0", "0", 1)
        return Plan(self.applied, self.applied, wanted, 4, way(self.applied, wanted), (green, *findings))

    async def request(self, wanted: Wanted, plan: Plan) -> Asked:
        self.asked.append(wanted)
        if self.authority == "file":
            return Asked(False, self.applied, "kubectl patch ...")
        self.applied = wanted.target
        return Asked(True, wanted.target)

    async def refused(self, wanted: Wanted, plan: Plan) -> None:
        self.turned_down.append((wanted, tuple(finding.gate for finding in plan.failed)))

    async def canary(self) -> list[CanaryOutcome]:
        return self.outcomes


class Held:
    """A running door with the routes."""

    def __init__(self, door: Door, control: Control, token: list[str | None]) -> None:
        self.door = door
        self.control = control
        self.token = token

    async def post(self, route: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
        sent = {"Authorization": f"Bearer {TOKEN}", **headers}
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        if data is not None:
            sent.setdefault("Content-Type", "application/json")
        url = f"{self.door.listener.url}/api/migration/{route}"
        async with self.door.client.post(url, data=data, headers={k: v for k, v in sent.items() if v}) as answer:
            return answer.status, json.loads(await answer.read())

    async def trail(self) -> list[str]:
        return [f"{line.who}|{line.what}|{line.why}|{line.evidence}" for line in await self.door.spool.audit_trail(100)]


@contextlib.asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[Held]:
    """A door with the routes, a token and a stub behind."""
    file = directory / "token"
    file.write_text(TOKEN)
    token: list[str | None] = [str(file)]
    box: list[Door] = []

    async def audit(*line: str) -> None:
        await box[0].spool.audit(*line)

    control = Control()
    guard = Guard(TokenFile(lambda: token[0]), audit, SystemClock())
    routes = Migration(control, guard, Budget(MIB), SystemClock().now_us).routes()
    async with open_door(directory / "spool", Settings(), routes, guard=guard) as door:
        box.append(door)
        yield Held(door, control, token)


@pytest.fixture
async def held(tmp_path):
    """Control in phase 0 with all gates green."""
    async with opened(tmp_path) as made:
        yield made


@pytest.mark.parametrize("route", POSTS)
async def test_nobody_without_the_token_changes_anything(held, route):
    """No token, another one, a foreign Host, no token configured: refused, in the trail, and nothing was asked."""
    assert (await held.post(route, Authorization=""))[0] == 401
    assert (await held.post(route, Authorization="Bearer nope"))[0] == 401
    assert (await held.post(route, Host="evil.example"))[0] == 403
    held.token[0] = None
    assert (await held.post(route))[0] == 403
    refused = [line.split("|")[3] for line in await held.trail()]
    assert refused == ["refused: Forbidden", "refused: Forbidden", "refused: Unauthorized", "refused: Unauthorized"]
    assert all(f"/api/migration/{route}" in line for line in await held.trail())
    assert (held.control.asked, held.control.turned_down) == ([], [])


@pytest.mark.parametrize(("route", "step"), STEPS.items())
async def test_a_step_whose_gates_are_green_is_asked_for_with_an_empty_body(held, route, step):
    """As the specification calls it; who, why and an evidence id go along."""
    held.control.applied = step[0]
    status, answer = await held.post(route)
    assert (status, answer["applied"], answer["from"], answer["to"]) == (200, True, step[0].label, step[1].label)
    (wanted,) = held.control.asked
    assert (wanted.target, wanted.force, wanted.why) == (step[1], None, "no reason given")
    assert wanted.by.startswith("token token from 127.0.0.1")
    assert answer["evidence_id"] == wanted.evidence_id != ""
    assert answer["gates"][0] == {
        "gate": "green",
        "ok": True,
        "observed": "0",
        "required": "0",
        "since": "1970-01-01T00:00:00.000001Z",
    }


@pytest.mark.parametrize(("route", "step"), STEPS.items())
@pytest.mark.parametrize("applied", Phase)
async def test_a_step_begins_where_it_begins(held, route, step, applied):
    """From any other phase it is 409 adjacent_step, forced or not; where it leads to, nothing is left to do."""
    held.control.applied = applied
    status, answer = await held.post(route, {"force": "now"})
    if applied in step:
        assert status == 200
        return
    assert (status, answer["error"]["code"]) == (409, "gates_failed")
    (failed,) = answer["error"]["failed"]
    assert (failed["gate"], failed["observed"]) == ("adjacent_step", applied.label)
    assert held.control.asked == []
    assert held.control.turned_down[0][1] == ("adjacent_step",)


async def test_a_red_gate_refuses_and_is_kept(held):
    """409 with each failed gate, observed and required; nothing is asked; a refusal is noted with the reason."""
    held.control.red = ("no_open_gap", "lag")
    status, answer = await held.post("enable-dual-write", {"reason": "change 12"})
    assert status == 409
    assert [(g["gate"], g["observed"], g["required"]) for g in answer["error"]["failed"]] == [
        ("no_open_gap", "7", "0"),
        ("lag", "7", "0"),
    ]
    assert answer["error"]["plan"]["steps"][0]["gates"][0] == "dynamodb_ready"
    ((wanted, gates),) = held.control.turned_down
    assert (wanted.why, gates, held.control.asked) == ("change 12", ("no_open_gap", "lag"), [])


async def test_force_overrides_a_red_gate_and_says_so(held):
    """It needs a reason; the answer names what was overridden, the trail has it before anything happens."""
    held.control.red = ("lag",)
    status, answer = await held.post("enable-dual-write", {"force": "approved by nobody"})
    assert (status, answer["overridden"]) == (200, ["lag"])
    assert held.control.asked[0].force == held.control.asked[0].why == "approved by nobody"
    assert (await held.trail())[0].endswith("|force: approved by nobody")
    assert (await held.post("enable-dual-write", {"force": " "}))[0] == 400


@pytest.mark.parametrize("red", [(), ("lag",)])
async def test_a_rehearsal_changes_nothing(held, red):
    """The same evidence, and green or not; nothing is asked for or refused."""
    held.control.red = red
    status, answer = await held.post("enable-dual-write?dry_run=true", {"reason": "looking"})
    assert (status, answer["green"], answer["dry_run"], answer["applied"]) == (200, not red, True, False)
    assert {gate["gate"] for gate in answer["gates"]} == {"green", *red}
    assert (held.control.asked, held.control.turned_down) == ([], [])
    assert (await held.trail())[0].endswith("|looking|dry run")


async def test_the_way_back_is_one_step_or_to_a_phase(held):
    """Without a body to the phase before; with ``to`` further; never forward."""
    held.control.applied = DYNAMO
    assert (await held.post("rollback"))[1]["to"] == "dual_write_read_dynamo"
    held.control.applied = DYNAMO
    status, answer = await held.post("rollback", {"to": "DualWrite"})
    assert (status, answer["to"], len(answer["steps"])) == (200, "dual_write", 2)
    for to in ("dynamo_only", "dual_write"):
        status, answer = await held.post("rollback", {"to": to, "force": "x"})
        assert (status, answer["error"]["failed"][0]["gate"]) == (409, "earlier_phase")
    held.control.applied = SQL
    assert (await held.post("rollback"))[0] == 409
    assert (await held.post("rollback", {"to": "nowhere"}))[0] == 400
    assert (await held.post("enable-dual-write", {"to": "dual_write"}))[0] == 400


async def test_where_the_file_decides_the_answer_is_the_command(held):
    """202, not applied, and what to run."""
    held.control.authority = "file"
    status, answer = await held.post("enable-dual-write")
    assert (status, answer["applied"], answer["patch"]) == (202, False, "kubectl patch ...")


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        ({"nope": 1}, {}, 400),
        ({"reason": 1}, {}, 400),
        ({"reason": "x" * 501}, {}, 400),
        ({}, {"Content-Type": "text/plain"}, 415),
        (b" " * 20_000, {}, 413),
    ],
)
async def test_a_body_that_is_not_understood_is_refused_and_noted(held, body, headers, status):
    """Nothing is looked at or asked for."""
    assert (await held.post("enable-dual-write", body, **headers))[0] == status
    assert (await held.trail())[0].endswith(f"|not understood|refused: {(await held.trail())[0].rsplit(' ', 1)[1]}")
    assert held.control.asked == []


async def test_an_unknown_parameter_is_refused(held):
    """A mistyped dry_run must not become a step."""
    assert (await held.post("enable-dual-write?dryrun=true"))[0] == 400
    assert (await held.post("enable-dual-write?dry_run=yes"))[0] == 400
    assert held.control.asked == []


async def test_the_canary_says_what_each_store_did(held):
    """200 where all came back, 409 with the problem where not."""
    status, answer = await held.post("test-dual-write")
    assert (status, answer["success"], set(answer["stores"])) == (200, True, {"postgres", "dynamodb"})
    held.control.outcomes[1] = CanaryOutcome("dynamodb", "read back with another user_id", 0.1)
    status, answer = await held.post("test-dual-write")
    assert (status, answer["success"]) == (409, False)
    assert answer["stores"]["dynamodb"]["problem"] == "read back with another user_id"


async def test_looking_needs_no_token(held):
    """State, fleet and history hold no secret and no payload."""
    assert (await held.door.get("/api/migration"))[:2] == (200, {"applied": "sql_only", "holds": []})
    assert (await held.door.get("/api/migration/fleet"))[0] == 200
    assert (await held.door.get("/api/migration/history?limit=3"))[1] == {"history": [{"why": "3"}]}
    for bad in ("0", "1001", "x", "9" * 5000, "%D9%A1"):  # the last is a digit of another script
        assert (await held.door.get(f"/api/migration/history?limit={bad}"))[0] == 400


async def test_every_route_is_described(held):
    """The document that is served has words for each, and is valid with them."""
    app = web.Application()
    app.add_routes(Migration(held.control, None, None, None).routes())
    document = openapi.document(app.router)
    assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []
    mine = document["paths"]
    assert set(mine) == {"/api/migration", "/api/migration/fleet", "/api/migration/history"} | {
        f"/api/migration/{route}" for route in POSTS
    }
    assert [p for p, item in mine.items() for o in item.values() if o["summary"] == openapi.UNDESCRIBED] == []
