"""The control routes: who may, what is audited, what each body may be, and what the answers hold."""

import contextlib
import json
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from sidecar.api.body import Budget
from sidecar.api.control import Control
from sidecar.api.guard import Guard
from sidecar.api.tokens import TokenFile
from sidecar.clock import SystemClock
from sidecar.dead_letter import DeadLetters
from sidecar.retry import Pace
from sidecar.settings import MIB, Retry, Settings
from sidecar.spool import Spool
from sidecar.steering import Steering
from tests.api.door import Door, open_door

TOKEN = "t0ken-canary"
SECRET = "payload-canary-5ecret"
ROUTES = [
    ("POST", "/api/control/stores/postgres/pause"),
    ("POST", "/api/control/stores/postgres/resume"),
    ("POST", "/api/control/stores/postgres/rate"),
    ("GET", "/api/control/dead-letters"),
    ("GET", "/api/control/dead-letters?payload=true"),
    ("POST", "/api/control/dead-letters/redrive"),
    ("POST", "/api/control/dead-letters/discard"),
    ("GET", "/api/control/dead-letters/export"),
    ("GET", "/api/control/spool"),
    ("GET", "/api/control/spool/export"),
    ("GET", "/api/control/spool/verify"),
    ("GET", "/api/control/audit"),
]


class FakeDelivery:
    """What steering steers; counts its wakes."""

    def __init__(self) -> None:
        import random

        self.pace = Pace(Retry(), 4, random.Random(1), 0.0)
        self.wakes = 0

    def wake(self) -> None:
        self.wakes += 1


@dataclass
class Held:
    """A running door with control, and the parts that a test looks at."""

    door: Door
    spool: Spool
    token: Path
    deliveries: dict[str, FakeDelivery]
    clock: "StillClock"
    path: list[str | None] = field(default_factory=list)

    async def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict]:
        """With the token, unless ``Authorization`` is given; the status and the document."""
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        sent = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json", **headers}
        async with self.door.client.request(
            method, self.door.listener.url + path, data=data, headers={k: v for k, v in sent.items() if v}
        ) as answer:
            raw = await answer.read()
            assert answer.headers["Content-Type"].startswith("application/")
            if "ndjson" in answer.headers["Content-Type"]:
                return answer.status, {"lines": [json.loads(line) for line in raw.splitlines()]}
            return answer.status, json.loads(raw)

    async def audit(self) -> list:
        """Newest first."""
        return list(await self.spool.audit_trail(1000))

    async def put(self, *names: str, secret: str = "x") -> dict[str, str]:
        """Records of these services, accepted; service -> log_id."""
        status, answer, _ = await self.door.post([{"service_name": n, "request_data": secret} for n in names])
        assert status == 202
        return dict(zip(names, answer["log_ids"], strict=True))


class StillClock(SystemClock):
    """Monotonic time that moves when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@contextlib.asynccontextmanager
async def opened(directory: Path, *, token: bool = True) -> AsyncIterator[Held]:
    """A door with control on a real spool."""
    file = directory / "token"
    file.write_text(TOKEN + "\n")
    path: list[str | None] = [str(file) if token else None]
    deliveries = {name: FakeDelivery() for name in ("postgres", "dynamodb")}
    clock = StillClock()
    box: list[Spool] = []

    class Late:
        """The spool, which ``open_door`` makes."""

        def __getattr__(self, name):
            return getattr(box[0], name)

    async def spool_audit(*line: str) -> None:
        await box[0].audit(*line)

    spool = Late()
    guard = Guard(TokenFile(lambda: path[0]), spool_audit, clock)
    letters = DeadLetters(spool, max_bytes=MIB, clock=clock)
    steering = Steering(spool, ("postgres", "dynamodb"), deliveries, clock)
    control = Control(spool, letters, steering, guard, Budget(MIB))
    async with open_door(directory / "spool", Settings(), control.routes(), guard=guard) as door:
        box.append(door.spool)
        yield Held(door, door.spool, file, deliveries, clock, path)


@pytest.fixture
async def held(tmp_path):
    """Control with a token."""
    async with opened(tmp_path) as made:
        yield made


# --- who may ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_without_the_token_every_route_is_401_and_audited(held, method, path):
    """No Authorization header: refused, with a line that names the route and nobody."""
    status, answer = await held.ask(method, path, {"reason": "x"} if method == "POST" else None, Authorization="")
    assert (status, answer["error"]["code"]) == (401, "unauthorized")
    (line,) = await held.audit()
    assert line.what.startswith(f"{method} /api/control/")
    assert line.who == "127.0.0.1"
    assert "refused: Unauthorized" in line.evidence


@pytest.mark.parametrize("given", [f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer", "Bearer \xe9"])
async def test_a_wrong_token_changes_nothing_and_is_audited_without_itself(held, given):
    """401, the pace untouched, and neither the given nor the right token in the trail."""
    status, _ = await held.ask("POST", ROUTES[0][1], {"reason": "x"}, Authorization=given)
    assert status == 401
    assert held.deliveries["postgres"].pace.paused_by is None
    (line,) = await held.audit()
    assert TOKEN not in repr(line)


async def test_without_a_token_file_mutations_are_off_not_open(tmp_path):
    """403 that names the setting, whatever token is sent; audited."""
    async with opened(tmp_path, token=False) as held:
        status, answer = await held.ask("POST", ROUTES[0][1], {"reason": "x"})
        assert status == 403
        assert "control.token_file" in answer["error"]["message"]
        assert held.deliveries["postgres"].pace.paused_by is None
        assert [line.evidence for line in await held.audit()] == ["refused: Forbidden"]


async def test_a_foreign_host_is_refused_before_the_token_and_audited(held):
    """A page that rebinds its name to 127.0.0.1 sends its own name, even with a stolen token."""
    status, _ = await held.ask("POST", ROUTES[0][1], {"reason": "x"}, Host="evil.example")
    assert status == 403
    assert held.deliveries["postgres"].pace.paused_by is None
    (line,) = await held.audit()
    assert line.evidence == "refused: Forbidden"
    status, _ = await held.ask("POST", "/logs", {"service_name": "x"}, Host="evil.example")
    assert status == 403
    assert len(await held.audit()) == 1, "other routes are not the audit trail's business"


async def test_a_renewed_token_counts_at_once(held):
    """The file is read again when it changes; the old token is out."""
    held.token.write_text("another-one-of-other-length")
    assert (await held.ask("GET", "/api/control/audit"))[0] == 401
    assert (await held.ask("GET", "/api/control/audit", Authorization="Bearer another-one-of-other-length"))[0] == 200


async def test_a_flood_of_refused_attempts_cannot_fill_the_trail(held):
    """Twenty lines, then one every ten minutes, which counts those left out."""
    for _ in range(50):
        assert (await held.ask("GET", "/api/control/audit", Authorization="Bearer no"))[0] == 401
    assert len(await held.audit()) == 20
    held.clock.now += 600
    await held.ask("GET", "/api/control/audit", Authorization="Bearer no")
    assert "30 more refused" in (await held.audit())[0].evidence


async def test_the_caller_who_says_who_it_is_stands_in_the_trail_made_harmless(held):
    """X-Actor beside the token's file and the peer: printable, 64 characters."""
    await held.ask("POST", ROUTES[0][1], {"reason": "x"}, **{"X-Actor": "alice " + "a" * 200})
    (line,) = await held.audit()
    assert line.who.startswith("token token from 127.0.0.1 as alice aaa")
    assert len(line.who) < 120


# --- orders ----------------------------------------------------------------------------------------------------------


async def test_pause_rate_and_resume_steer_the_store_and_leave_who_and_why(held):
    """Each takes effect at once, on that store alone; the trail has one line for each."""
    pace, other = held.deliveries["postgres"].pace, held.deliveries["dynamodb"].pace
    status, answer = await held.ask("POST", "/api/control/stores/postgres/pause", {"reason": "maintenance"})
    assert status == 200
    assert answer["orders"]["paused"]["reason"] == "maintenance"
    assert pace.paused_by is not None
    assert pace.permit(10, 0.0) is None
    assert other.paused_by is None
    body = {"reason": "gently", "records_per_second": 50}
    _, answer = await held.ask("POST", "/api/control/stores/postgres/rate", body)
    assert answer["orders"]["rate"]["records_per_second"] == 50
    assert pace.rate.current == 50
    _, answer = await held.ask("POST", "/api/control/stores/postgres/resume", {"reason": "done"})
    assert "paused" not in answer["orders"]
    assert pace.paused_by is None
    assert pace.rate.manual == 50, "a rate outlives a pause"
    body = {"reason": "enough", "records_per_second": None}
    _, answer = await held.ask("POST", "/api/control/stores/postgres/rate", body)
    assert (answer["orders"], pace.rate.manual) == ({}, None)
    assert held.deliveries["postgres"].wakes == 5
    assert [(line.what, line.why) for line in reversed(await held.audit())] == [
        ("pause postgres", "maintenance"),
        ("rate postgres 50/s", "gently"),
        ("resume postgres", "done"),
        ("rate postgres none", "enough"),
    ]


@pytest.mark.parametrize(
    ("verb", "body", "status"),
    [
        ("pause", {}, 400),
        ("pause", {"reason": ""}, 400),
        ("pause", {"reason": "  "}, 400),
        ("pause", {"reason": "x" * 501}, 400),
        ("pause", {"reason": 7}, 400),
        ("pause", {"reason": "x", "store": "y"}, 400),
        ("pause", [], 400),
        ("pause", b"{", 400),
        ("pause", b"", 400),
        ("pause", b'{"reason": "' + b"x" * 300_000 + b'"}', 413),
        ("rate", {"reason": "x"}, 400),
        ("rate", {"reason": "x", "records_per_second": "7"}, 400),
        ("rate", {"reason": "x", "records_per_second": True}, 400),
        ("rate", {"reason": "x", "records_per_second": 0}, 400),
        ("rate", {"reason": "x", "records_per_second": -1}, 400),
        ("rate", {"reason": "x", "records_per_second": 1e7}, 400),
        ("rate", b'{"reason": "x", "records_per_second": NaN}', 400),
    ],
)
async def test_a_body_that_is_not_exactly_right_changes_nothing(held, verb, body, status):
    """Strict types; the attempt is in the trail."""
    answered, _ = await held.ask("POST", f"/api/control/stores/postgres/{verb}", body)
    assert answered == status
    pace = held.deliveries["postgres"].pace
    assert (pace.paused_by, pace.rate.manual) == (None, None)
    (line,) = await held.audit()
    assert line.why == "not understood"


async def test_another_media_type_is_415_and_an_unknown_store_404(held):
    """A form that a browser can send without asking first is not taken."""
    path = "/api/control/stores/postgres/pause"
    assert (await held.ask("POST", path, {"reason": "x"}, **{"Content-Type": "text/plain"}))[0] == 415
    assert (await held.ask("POST", "/api/control/stores/mysql/pause", {"reason": "x"}))[0] == 404


async def test_orders_are_in_force_again_after_a_restart(tmp_path):
    """Kept in the spool with who, why and since when; a fresh process applies them."""
    async with opened(tmp_path) as held:
        await held.ask("POST", "/api/control/stores/dynamodb/pause", {"reason": "night"})
        before = held.spool.meta("orders:dynamodb")
    async with opened(tmp_path) as held:
        deliveries = {"dynamodb": FakeDelivery()}
        steering = Steering(held.spool, ("postgres", "dynamodb"), deliveries, held.clock)
        steering.restore()
        assert held.spool.meta("orders:dynamodb") == before
        assert deliveries["dynamodb"].pace.paused_by is not None
        assert steering.status()["dynamodb"]["paused"]["reason"] == "night"
        assert steering.status()["postgres"] == {}


# --- dead letters ----------------------------------------------------------------------------------------------------


async def dead(held, *names: str) -> dict[str, str]:
    """Dead letters at PostgreSQL, delivered to DynamoDB; service -> log_id."""
    ids = await held.put(*names, secret=SECRET)
    await held.door.deliver("postgres", refuse=names)
    await held.door.deliver("dynamodb")
    assert held.spool.counters("postgres").dead_lettered >= len(names)
    return ids


async def test_the_list_shows_no_payload_unless_asked_for_and_then_it_is_audited(held):
    """No value of a record by default; with payload=true the record, and a line in the trail."""
    ids = await dead(held, "a", "b")
    status, answer = await held.ask("GET", "/api/control/dead-letters")
    assert status == 200
    assert SECRET not in json.dumps(answer)
    assert [d["log_id"] for d in answer["dead_letters"]] == [ids["a"], ids["b"]]
    assert answer["dead_letters"][0]["class"] == "permanent"
    assert await held.audit() == []
    _, answer = await held.ask("GET", "/api/control/dead-letters?payload=true")
    assert answer["dead_letters"][0]["record"]["request_data"] == SECRET
    assert [line.why for line in await held.audit()] == ["payload shown"]


async def test_pages_hold_each_letter_once(held):
    """Following next_after walks through all of them; the last page says so."""
    await dead(held, *(f"s{n}" for n in range(70)))
    seen, after = [], 0
    while after is not None:
        _, page = await held.ask("GET", f"/api/control/dead-letters?limit=33&after={after}")
        seen += [d["key"] for d in page["dead_letters"]]
        after = page["next_after"]
    assert len(seen) == len(set(seen)) == 70


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=1001", "limit=x", "after=-1", "payload=1", "payload=true&limit=33", "nope=1", "after=1&after=2"],
)
async def test_queries_are_read_strictly(held, query):
    """A misspelt or repeated parameter is no filter: 400."""
    assert (await held.ask("GET", f"/api/control/dead-letters?{query}"))[0] == 400


async def test_redrive_by_id_reason_store_and_all_takes_exactly_those(held):
    """What is selected is owed again, and nothing else; the trail says who, why and how many."""
    ids = await dead(held, "a", "b", "c")
    path = "/api/control/dead-letters/redrive"
    _, answer = await held.ask("POST", path, {"reason": "mended", "select": {"log_ids": [ids["b"]]}})
    assert answer == {"records": 1}
    left = [d["log_id"] for d in (await held.ask("GET", "/api/control/dead-letters"))[1]["dead_letters"]]
    assert left == [ids["a"], ids["c"]]
    for select in ({"reason": "conflict"}, {"store": "dynamodb"}, {"log_ids": [ids["b"]]}):
        _, answer = await held.ask("POST", path, {"reason": "none", "select": select})
        assert answer == {"records": 0}
    _, answer = await held.ask(
        "POST", path, {"reason": "mended", "select": {"reason": "permanent", "store": "postgres"}}
    )
    assert answer == {"records": 2}
    account = held.spool.counters("postgres")
    assert (account.dead_lettered, account.pending) == (0, 3)
    assert any(line.what == "redrive" and "records=2" in line.evidence for line in await held.audit())


async def test_redrive_all_takes_every_store_and_leaves_what_the_door_refused(held):
    """Those refused at the door have no store to go to."""
    await dead(held, "a", "b")
    await held.spool.refuse([(b'{"service_name": 1}', "service_name", "not a text")])
    body = {"reason": "all again", "select": {"all": True}}
    assert (await held.ask("POST", "/api/control/dead-letters/redrive", body))[1] == {"records": 2}
    assert held.spool.dead_letter_counts() == {("door", "refused"): 1}


@pytest.mark.parametrize(
    "body",
    [
        {"select": {"all": True}},
        {"reason": "", "select": {"all": True}},
        {"reason": "x"},
        {"reason": "x", "select": {}},
        {"reason": "x", "select": {"all": False}},
        {"reason": "x", "select": {"all": 1}},
        {"reason": "x", "select": {"log_ids": ["nonsense"]}},
        {"reason": "x", "select": {"log_ids": "01a204c8-a2b0-73b9-9def-f9701dd78c8b"}},
        {"reason": "x", "select": {"log_ids": ["01a204c8-a2b0-73b9-9def-f9701dd78c8b"] * 1001}},
        {"reason": "x", "select": {"log_ids": ["01a204c8-a2b0-73b9-9def-f9701dd78c8b"], "reason": "permanent"}},
        {"reason": "x", "select": {"everything": True}},
    ],
)
async def test_a_discard_that_is_not_exactly_said_discards_nothing(held, body):
    """Without a reason, without a selection, with a guess in it: 400."""
    await dead(held, "a")
    assert (await held.ask("POST", "/api/control/dead-letters/discard", body))[0] == 400
    assert held.spool.counters("postgres").dead_lettered == 1


async def test_discard_gives_up_and_the_trail_keeps_who_why_and_how_many(held):
    """Counted as discarded; the identity holds."""
    await dead(held, "a", "b")
    body = {"reason": "test data", "select": {"store": "postgres"}}
    assert (await held.ask("POST", "/api/control/dead-letters/discard", body))[1] == {"records": 2}
    account = held.spool.counters("postgres")
    assert (account.discarded, account.dead_lettered, account.owed) == (2, 0, 2)
    _, answer = await held.ask("GET", "/api/control/audit")
    line = next(line for line in answer["audit"] if line["what"] == "discard")
    assert line["why"] == "test data"
    assert line["who"].startswith("token token")
    assert "records=2" in line["evidence"]


async def test_the_export_holds_what_was_sent_byte_for_byte_and_what_the_door_refused(held):
    """NDJSON with record, or raw, or raw_base64 where it is no text; audited."""
    ids = await dead(held, *(f"s{n}" for n in range(40)))
    await held.spool.refuse([(b'{"service_name": 1}', "service_name", "no"), (b"\xff\x00", "", "not UTF-8")])
    _, answer = await held.ask("GET", "/api/control/dead-letters/export")
    lines = answer["lines"]
    assert {line["log_id"] for line in lines if line["store"] == "postgres"} == set(ids.values())
    assert all(line["record"]["request_data"] == SECRET for line in lines if line["store"] == "postgres")
    first, second = (line for line in lines if line["store"] == "door")
    assert (first["raw"], second["raw_base64"]) == ('{"service_name": 1}', "/wA=")
    _, answer = await held.ask("GET", "/api/control/dead-letters/export?store=door")
    assert len(answer["lines"]) == 2
    assert [line.why for line in await held.audit()] == ["payload exported"] * 2


# --- spool -----------------------------------------------------------------------------------------------------------


async def test_the_spool_lists_what_waits_for_whom_without_payload(held):
    """Frames that every store has are gone from the list; accounts and state stand beside it."""
    await held.put("a", "b", secret=SECRET)
    await held.put("c", secret=SECRET)
    _, answer = await held.ask("GET", "/api/control/spool")
    assert [(f["records"], f["pending"]) for f in answer["frames"]] == [
        (2, ["dynamodb", "postgres"]),
        (1, ["dynamodb", "postgres"]),
    ]
    assert answer["stores"]["postgres"]["pending"] == 3
    assert SECRET not in json.dumps(answer)
    await held.door.deliver("postgres")
    _, answer = await held.ask("GET", "/api/control/spool")
    assert [f["pending"] for f in answer["frames"]] == [["dynamodb"], ["dynamodb"]]
    assert answer["frames"][0]["required"] == ["postgres"]
    await held.door.deliver("dynamodb")
    _, answer = await held.ask("GET", "/api/control/spool")
    assert (answer["frames"], answer["next_after"]) == ([], None)


async def test_the_spool_is_listed_in_pages_that_hold_each_frame_once(held):
    """More frames than one page, and more than one step of the walk."""
    for n in range(12):
        await held.put(f"s{n}")
    seen, after = [], 0
    while after is not None:
        _, page = await held.ask("GET", f"/api/control/spool?limit=5&after={after}")
        seen += [f["seq"] for f in page["frames"]]
        after = page["next_after"]
    assert len(seen) == len(set(seen)) == 12


async def test_the_spool_export_holds_each_record_that_is_owed_once_with_its_fate(held):
    """Pending, deferred with and without their frame; what is dead or delivered everywhere is not owed."""
    ids = await held.put("a", "dead", secret=SECRET)
    await held.door.deliver("postgres", refuse=["dead"])
    _, answer = await held.ask("GET", "/api/control/spool/export")
    assert {line["record"]["log_id"]: line["stores"] for line in answer["lines"]} == {
        ids["a"]: {"dynamodb": "pending", "postgres": "delivered"},
        ids["dead"]: {"dynamodb": "pending", "postgres": "dead_lettered"},
    }
    await held.door.deliver("dynamodb")
    _, answer = await held.ask("GET", "/api/control/spool/export")
    assert answer["lines"] == []
    await held.ask("POST", "/api/control/dead-letters/redrive", {"reason": "again", "select": {"all": True}})
    _, answer = await held.ask("GET", f"/api/control/spool/export?log_id={ids['dead']}")
    assert [line["stores"] for line in answer["lines"]] == [{"postgres": "deferred"}]
    _, answer = await held.ask("GET", f"/api/control/spool/export?log_id={ids['a']}")
    assert answer["lines"] == []
    assert sum(line.why == "payload exported" for line in await held.audit()) == 4


async def test_verify_counts_everything_and_finds_a_flipped_byte(held):
    """Sound: no problems. One damaged byte in a body: one damaged record."""
    await held.put(*(f"s{n}" for n in range(20)))
    _, answer = await held.ask("GET", "/api/control/spool/verify")
    assert (answer["frames"], answer["records"], answer["problems"]) == (1, 20, [])

    def damage(connection) -> None:
        (body,) = connection.execute("SELECT body FROM frames").fetchone()
        flipped = body[:20] + bytes([body[20] ^ 1]) + body[21:]
        connection.execute("UPDATE frames SET body = ?", (flipped,))

    await held.spool.write(damage)
    _, answer = await held.ask("GET", "/api/control/spool/verify")
    assert answer["problems"] == ["1 damaged records"]


async def test_the_audit_trail_survives_a_restart(tmp_path):
    """Lines are as durable as records."""
    async with opened(tmp_path) as held:
        await held.ask("POST", "/api/control/stores/postgres/pause", {"reason": "kept"})
        before = await held.audit()
    async with opened(tmp_path) as held:
        assert await held.audit() == before
        assert stat.S_IMODE((tmp_path / "spool" / "spool.db").stat().st_mode) == 0o600
        assert msgspec.json.decode(held.spool.meta("orders:postgres"))["paused"]["reason"] == "kept"
