"""Phase control from outside: one process of a fleet, real stores, evidence by the product's own commands."""

import asyncio
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp

from tests.parts import oracle
from tests.parts.sidecar import Sidecar, eventually

TOKEN = "phase-control-token"
FLEET = {"enabled": True, "heartbeat": "300ms", "fence_after": "3s"}


class Operator:
    """Asks one sidecar as an operator does."""

    def __init__(self, http: aiohttp.ClientSession, sidecar: Sidecar) -> None:
        self.http = http
        self.sidecar = sidecar

    async def ask(self, route: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
        """POST to /api/migration with the token, unless ``Authorization`` is given."""
        sent = {"Authorization": f"Bearer {TOKEN}", **headers}
        async with self.http.post(f"{self.sidecar.url}/api/migration/{route}", json=body, headers=sent) as answer:
            return answer.status, await answer.json()

    async def refused_by(self, route: str) -> set[str]:
        """The gates that refuse it."""
        status, answer = await self.ask(route)
        assert status == 409, answer
        return {gate["gate"] for gate in answer["error"]["failed"]}

    async def send(self, n: int = 20) -> list[str]:
        """Records, acknowledged; their ids."""
        body = [{"service_name": "phase-control", "request_data": str(i)} for i in range(n)]
        async with self.http.post(f"{self.sidecar.url}/logs", json=body) as answer:
            assert answer.status == 202, await answer.text()
            return (await answer.json())["log_ids"]

    async def sends(self, ids: list[str]) -> None:
        """Records without end, until cancelled; ``ids`` of those that were acknowledged."""
        while True:
            ids += await self.send(5)
            await asyncio.sleep(0.1)

    async def phase(self) -> str:
        """Applied."""
        return (await self.sidecar.json("/api/migration"))["applied"]

    async def reaches(self, phase: str) -> None:
        """Await it."""

        async def there() -> bool:
            return await self.phase() == phase

        await eventually(there, what=phase)

    async def run(self, *arguments: str, code: int = 0) -> str:
        """A command of the product."""
        done = await self.sidecar.command(*arguments)
        assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
        return done.stdout


async def test_a_fleet_walks_to_the_end_and_back_on_evidence_alone(quick_stand, http, tmp_path: Path):
    """0 to 3 and back to 0: each step waits for its gates, and nothing acknowledged is missing in the end."""
    stand, token = quick_stand, tmp_path / "token"
    token.write_text(TOKEN)
    sidecar = await stand.sidecar(
        phase="sql_only",
        phase_authority="api",
        fleet=FLEET,
        control={"token_file": str(token)},
        phases={"min_soak": 0},
        validation={"settle": 0, "interval": 0},
    ).start()
    operator = Operator(http, sidecar)
    sent = await operator.send()

    assert (await operator.ask("enable-dual-write", Authorization=""))[0] == 401
    assert (await operator.ask("enable-dual-write", Authorization="Bearer other"))[0] == 401
    assert (await operator.ask("enable-dual-write", Host="evil.example"))[0] == 403
    async with http.get(f"{sidecar.url}/api/control/audit", headers={"Authorization": f"Bearer {TOKEN}"}) as answer:
        trail = [line["evidence"] for line in (await answer.json())["audit"]]
    assert [line for line in trail if line.startswith("refused")] == [
        "refused: Forbidden",
        "refused: Unauthorized",
        "refused: Unauthorized",
    ]
    assert await operator.refused_by("disable-sql-writes") == {"adjacent_step"}

    status, plan = await operator.ask("enable-dual-write?dry_run=true")
    assert (status, plan["green"], await operator.phase()) == (200, True, "sql_only")
    assert "ok  canary" in await operator.run("phase", "plan", "dual_write")
    status, answer = await operator.ask("enable-dual-write", {"reason": "change 1"})
    assert (status, answer["applied"]) == (200, True), answer
    sent += await operator.send()

    await sidecar.drained()
    assert await operator.refused_by("switch-to-dynamo-reads") == {"no_open_gap", "days_validated", "tail_validated"}
    step = ("dual_write_read_dynamo", "--why", "change 2")
    await operator.run("phase", "set", *step, code=2)
    assert "RED no_open_gap: " in await operator.run("phase", "plan", step[0], code=1)
    await operator.run("backfill", "--from", "postgres", "--to", "dynamodb")
    await operator.run("validate", "--all")
    await operator.run("phase", "set", *step, "--wait", "20")
    assert await operator.phase() == "dual_write_read_dynamo"
    sent += await operator.send()

    await sidecar.drained()
    await operator.run("validate", "--all")
    assert await operator.refused_by("disable-sql-writes") == {"reverse_feasible"}
    await operator.run("backfill", "--from", "dynamodb", "--to", "postgres", "--dry-run")
    status, answer = await operator.ask("disable-sql-writes")
    assert status in (200, 202), answer
    await operator.reaches("dynamo_only")
    alone = await operator.send()
    await sidecar.drained()
    before = set(await stand.in_postgres())
    assert not set(alone) & before

    live: list[str] = []  # from here on to the end of the way back there is traffic
    load = asyncio.create_task(operator.sends(live))
    await eventually(lambda: len(live) > 50, what="records of phase 3 under load")
    await operator.run("phase", "rollback", "--to", "dual_write", "--why", "change 3", code=1)
    await operator.reaches("dual_write_read_dynamo")
    again = await operator.send()

    async def held() -> bool:
        return "no_open_gap" in [hold["gate"] for hold in (await sidecar.json("/api/migration"))["holds"]]

    await eventually(held, what="held by the gap of PostgreSQL")
    assert "held by   no_open_gap: " in await operator.run("phase", "show", code=1)
    await operator.run("backfill", "--from", "dynamodb", "--to", "postgres")
    await operator.reaches("dual_write")
    load.cancel()
    await asyncio.gather(load, return_exceptions=True)
    await sidecar.drained()
    rows = await stand.in_postgres()
    oracle.assert_same(rows, await stand.in_dynamodb())
    acknowledged = {*alone, *again, *live}
    assert acknowledged <= rows.keys() - before  # what phase 3 wrote alone, and what came since, came to PostgreSQL
    assert len(rows.keys() - before - acknowledged) <= 5  # nothing else: but for a batch whose answer nobody awaited
    status, answer = await operator.ask("rollback")
    assert status in (200, 202), answer
    await operator.reaches("sql_only")

    async def agreed() -> bool:
        return not (await sidecar.json("/api/migration"))["holds"]

    await eventually(agreed, what="applied by every instance")
    await operator.run("phase", "show")
    fleet = json.loads(await operator.run("fleet", "--json"))
    assert [(i["state"], i["phase"]) for i in fleet["instances"]] == [("live", "sql_only")]

    await sidecar.drained()
    everything = [*sent, *alone, *again, *live]
    oracle.assert_holds(await stand.in_postgres(), everything)
    oracle.assert_holds(await stand.in_dynamodb(), everything)
    history = (await sidecar.json("/api/migration/history?limit=1000"))["history"]
    steps = [(e["from"], e["to"]) for e in reversed(history) if e["action"] == "step" and e["outcome"] == "done"]
    way = ["sql_only", "dual_write", "dual_write_read_dynamo", "dynamo_only"]
    walk = [*way, *way[-2::-1]]
    assert steps == list(pairwise(walk))
    assert {e["outcome"] for e in history} == {"intended", "done", "refused"}
    assert {"change 1", "change 2", "change 3"} <= {e["why"] for e in history}
    assert all(
        e["evidence"] for e in history if e["action"] == "step" and e["to"] != "sql_only" and e["outcome"] != "done"
    )
