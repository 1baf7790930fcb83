"""A spool at its cap, with real processes and real stores: who pushes back, who is released, and what is left."""

import asyncio
import io
import json
import time
import uuid
from datetime import UTC, datetime

from sidecar.clock import SystemClock
from sidecar.record import LogRecord
from sidecar.stores.dynamodb import DynamoDBStore
from tests.parts import oracle
from tests.parts.account import watching
from tests.parts.fault_proxy import Refuse
from tests.parts.postgres import connect
from tests.parts.sidecar import eventually

MIB = 1024 * 1024
CAP = 16 * MIB
SPOOL = {"cap_bytes": CAP, "ballast_bytes": MIB}
PAYLOAD = "x" * 60_000
HOURS = ("2026-03-01T10:59:59Z", "2026-03-01T11:00:00Z", "2026-03-01T12:30:00Z")
PUSHED = 'sidecar_backpressure_active{{reason="{}"}}'


def batch(n: int, *, size: int = 20) -> list[dict]:
    """Records of 60 KB with ids and times of their own."""
    return [
        {
            "log_id": str(uuid.uuid4()),
            "log_timestamp": HOURS[(n + i) % len(HOURS)],
            "service_name": "svc",
            "request_data": PAYLOAD,
        }
        for i in range(size)
    ]


async def offer(http, sidecar, records) -> tuple[int, dict, dict]:
    """One request: status, headers, document."""
    body = io.BytesIO(json.dumps(records).encode())
    async with http.post(f"{sidecar.url}/logs", data=body, headers={"Content-Type": "application/json"}) as answer:
        return answer.status, dict(answer.headers), json.loads(await answer.text())


async def fill(http, sidecar) -> set[str]:
    """Post until the door stays closed; the ids that were accepted."""
    acked: set[str] = set()
    while True:
        for n in range(120):
            status, headers, document = await offer(http, sidecar, batch(n, size=5))
            if status == 503:
                break
            assert status == 202, document
            acked.update(document["log_ids"])
        assert status == 503, "never full"
        assert 1 <= int(headers["Retry-After"]) <= 60
        assert document["error"]["code"] == "spool_full"
        await asyncio.sleep(0.3)  # an idle spool tidies its log, which is an eighth of so small a cap
        if (await sidecar.metrics())[PUSHED.format("spool_full")]:
            return acked


def released(metrics: dict[str, float]) -> float:
    """Records released for DynamoDB."""
    return metrics['sidecar_store_records_released_total{store="dynamodb"}']


async def test_dynamodb_down_until_the_cap_refuses_nobody_and_a_copy_of_the_released_hours_heals(stand, http):
    """Phase 1, twice the cap: all 202; the ledger has hours and counts; copied from PostgreSQL, both are equal."""
    stand.dynamo.on("*", Refuse(500, "InternalServerError"))
    sidecar = await stand.sidecar(spool=SPOOL).start()
    answers: list[int] = []

    async def client(first: int) -> None:
        for n in range(first, first + 7):
            status, _, document = await offer(http, sidecar, batch(n))
            answers.append(status)
            assert status == 202, document

    async with watching(sidecar) as scrapes:
        await asyncio.gather(*(client(10 * i) for i in range(4)))

        async def open_again() -> bool:
            return not (await sidecar.metrics())[PUSHED.format("spool_full")]

        await eventually(open_again)
        before = released(await sidecar.metrics())
        assert before > 150
        sidecar.kill()
        await sidecar.start()
        assert released(await sidecar.metrics()) >= before
        stand.dynamo.clear()
        await sidecar.drained(60)
        metrics = await sidecar.metrics()
        assert metrics['sidecar_open_gap_records{kind="released",store="dynamodb"}'] == released(metrics)
    assert answers == [202] * 28
    assert scrapes.seen > 20

    sql, dynamo = await stand.in_postgres(), await stand.in_dynamodb()
    missing = sql.keys() - dynamo.keys()
    assert len(sql) == 560
    assert len(missing) == released(metrics)
    admin = await connect(stand.postgres)
    ledger = dict(await admin.fetch("SELECT hour, sum(opened - closed)::int FROM integration_logs_gaps GROUP BY hour"))
    rows = await admin.fetch(
        "SELECT * FROM integration_logs WHERE floor(extract(epoch FROM log_timestamp) / 3600) = ANY($1::bigint[])",
        list(ledger),
    )
    await admin.close()
    assert ledger == by_hour(sql[log_id]["log_timestamp"] for log_id in missing)
    store = DynamoDBStore(stand.dynamodb, clock=SystemClock())
    copied = await store.put_if_absent([as_record(row) for row in rows])
    await store.close()
    assert sum(copied) == len(missing)
    oracle.assert_same(sql, await stand.in_dynamodb())


def by_hour(stamps) -> dict[int, int]:
    """Hours since the epoch -> how many."""
    found: dict[int, int] = {}
    for stamp in stamps:
        hour = int(datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC).timestamp()) // 3600
        found[hour] = found.get(hour, 0) + 1
    return found


def as_record(row) -> LogRecord:
    """A row as the record that it was."""
    fields = dict(row) | {"log_id": str(row["log_id"]), "log_timestamp": round(row["log_timestamp"].timestamp() * 1e6)}
    return LogRecord(**fields)


async def test_postgres_down_until_the_cap_pushes_back_and_recovers_by_itself(stand, http):
    """503 with Retry-After, ready all the same, reads and the other store go on; nothing lost, open again by itself."""
    await stand.sql.refuse()
    sidecar = await stand.sidecar(spool=SPOOL, phase="dual_write_read_dynamo").start()
    async with watching(sidecar):
        acked = await fill(http, sidecar)
        metrics = await sidecar.metrics()
        assert metrics[PUSHED.format("spool_full")] == 1
        assert metrics["sidecar_spool_bytes"] >= 0.85 * CAP
        assert released(metrics) == 0
        async with http.get(f"{sidecar.ops}/readyz") as ready:
            assert ready.status == 200

        async def delivered() -> bool:
            return (await sidecar.metrics())['sidecar_store_pending_records{store="dynamodb"}'] == 0

        await eventually(delivered, what="the other store's drain")
        one = next(iter(acked))
        assert (await sidecar.json(f"/logs/{one}"))["log_id"] == one
        assert (await offer(http, sidecar, batch(1, size=1)))[0] == 503
        sidecar.kill()
        await sidecar.start()
        acked |= await fill(http, sidecar)
        await stand.sql.normal()

        async def accepted() -> bool:
            status, _, document = await offer(http, sidecar, batch(1, size=1))
            if status == 202:
                acked.update(document["log_ids"])
            return status == 202

        await eventually(accepted, what="open again")
        await sidecar.drained(60)
    sql, dynamo = await stand.in_postgres(), await stand.in_dynamodb()
    assert sql.keys() == acked
    oracle.assert_same(sql, dynamo)


async def test_a_closed_door_stays_closed_until_the_low_watermark_and_says_when(stand, http):
    """While a slow PostgreSQL drains: no 202 above the low watermark; Retry-After is 60, then about what it takes."""
    await stand.sql.refuse()
    options = SPOOL | {"low_watermark": 0.4}
    sidecar = await stand.sidecar(spool=options, phase="sql_only", ingest={"max_body_bytes": 5 * MIB}).start()
    await fill(http, sidecar)
    assert (await offer(http, sidecar, batch(1, size=1)))[1]["Retry-After"] == "60"
    await stand.sql.normal()
    stand.sql.latency = 0.015
    said: list[tuple[float, int]] = []
    while True:
        status, headers, _ = await offer(http, sidecar, batch(1, size=1))
        used = (await sidecar.metrics())["sidecar_spool_bytes"]
        if status == 202:
            break
        said.append((time.monotonic(), int(headers["Retry-After"])))
    opened = time.monotonic()
    assert used < 0.45 * CAP
    assert len(said) > 10
    assert said[-1][1] < 60
    assert min(abs(opened - at - told) for at, told in said) < 3
    stand.sql.latency = 0.0
    await sidecar.drained()


async def test_what_was_accepted_as_best_effort_is_never_released_once_the_phase_requires_it(stand, http):
    """Accepted in dual_write with DynamoDB down, a step to dual_write_read_dynamo: full means 503, and all arrives."""
    stand.dynamo.on("*", Refuse(500, "InternalServerError"))
    sidecar = await stand.sidecar(spool=SPOOL).start()
    acked: set[str] = set()
    for n in range(6):
        acked.update((await offer(http, sidecar, batch(n)))[2]["log_ids"])
    sidecar.configure(phase="dual_write_read_dynamo", phase_force="a scenario")

    async def applied() -> bool:
        return (await sidecar.json("/status"))["phase"]["applied"] == "dual_write_read_dynamo"

    await eventually(applied)
    acked |= await fill(http, sidecar)
    sidecar.kill()
    await sidecar.start()
    acked |= await fill(http, sidecar)
    assert released(await sidecar.metrics()) == 0
    stand.dynamo.clear()
    await sidecar.drained(60)
    sql, dynamo = await stand.in_postgres(), await stand.in_dynamodb()
    assert sql.keys() == acked
    oracle.assert_same(sql, dynamo)


async def test_fail_closed_answers_503_while_an_owed_store_is_down_and_is_switched_live(stand, http):
    """Down longer than fail_closed_after: 503 with its reason; switched off and on by the file; open when it is up."""
    await stand.sql.refuse()
    sidecar = await stand.sidecar(continue_on_write_failure=False, fail_closed_after="300ms").start()
    acked: list[str] = []

    async def answers(wanted: int) -> bool:
        status, headers, document = await offer(http, sidecar, batch(1, size=1))
        if status == 202:
            acked.extend(document["log_ids"])
        elif status == 503:
            assert document["error"]["code"] == "fail_closed"
            assert 1 <= int(headers["Retry-After"]) <= 60
        return status == wanted

    assert await answers(202)
    await eventually(lambda: answers(503), what="closed")
    assert (await sidecar.metrics())[PUSHED.format("fail_closed")] == 1
    sidecar.configure(continue_on_write_failure=True)
    await eventually(lambda: answers(202), what="open by the file")
    assert (await sidecar.metrics())[PUSHED.format("fail_closed")] == 0
    sidecar.configure(continue_on_write_failure=False)
    await eventually(lambda: answers(503), what="closed by the file")
    await stand.sql.normal()
    await eventually(lambda: answers(202), what="open because the store is up")
    await sidecar.drained()
    assert (await stand.in_postgres()).keys() == set(acked)


async def test_a_store_whose_records_wait_for_the_gap_ledger_is_not_called_up(stand, http):
    """The ledger beside its table is gone: ``waiting`` and why, wherever a state is told; fail-closed counts it."""
    admin = await connect(stand.postgres)
    sidecar = await stand.sidecar(phase="sql_only", fail_closed_after="100ms").start()

    async def state() -> str:
        return (await sidecar.json("/status"))["stores"]["postgres"]["state"]

    try:
        assert await state() == "up"
        await admin.execute("ALTER TABLE integration_logs_gaps RENAME TO moved")
        assert (await offer(http, sidecar, batch(1, size=1)))[0] == 202

        async def waits() -> bool:
            return await state() == "waiting"

        await eventually(waits, what="waiting")
        shown = (await sidecar.json("/status"))["stores"]["postgres"]
        assert "wait for a line in the gap ledger" in shown["reason"]
        assert "the table is missing [42P01]" in shown["reason"]
        assert shown["account"]["pending"] == 1
        metrics = await sidecar.metrics()
        assert metrics['sidecar_store_state{state="waiting",store="postgres"}'] == 1
        assert metrics['sidecar_store_state{state="up",store="postgres"}'] == 0
        assert (await sidecar.json("/healthz", ops=True))["stores"] == {"postgres": "waiting", "dynamodb": "up"}
        sidecar.configure(continue_on_write_failure=False)

        async def closed() -> bool:
            return (await sidecar.metrics())[PUSHED.format("fail_closed")] == 1

        await eventually(closed, what="closed")
        assert (await offer(http, sidecar, batch(1, size=1)))[0] == 503
        await admin.execute("ALTER TABLE moved RENAME TO integration_logs_gaps")
        await sidecar.drained()
        assert await state() == "up"
        assert (await offer(http, sidecar, batch(1, size=1)))[0] == 202
        await sidecar.drained()
        assert len(await stand.in_postgres()) == 2
    finally:
        await admin.close()
