"""F11 to F15: the stores refuse, vanish, stop, answer late, lose answers, cut them, throttle and lose their keys."""

import asyncio
import contextlib
import os
import signal

import pytest

from tests.faults.client import Client
from tests.faults.network import cable
from tests.faults.process import advances, start
from tests.faults.verdict import felt, guilty, judge
from tests.parts.fault_proxy import CutReply, Delay, Hang, LoseReply, Raw, Refuse, Reset, Unprocess
from tests.parts.postgres import connect
from tests.parts.sidecar import eventually

PHASE = "dual_write_read_dynamo"
QUICK = {"delay": "1ms", "max_delay": "4ms", "probe_interval": "50ms"}
PATIENCE = {"connect_timeout": "300ms"}
SQL, DYNAMO = "postgres", "dynamodb"


async def refuse(stand, store: str, how=None) -> None:
    """The store is down: nobody listens, or every call is answered with ``how``."""
    if store == SQL:
        await stand.sql.refuse()
    else:
        stand.dynamo.on("*", how or Refuse(500, "InternalServerError"))


async def heal(stand) -> None:
    """Both stores as they should be."""
    await stand.sql.normal()
    stand.dynamo.clear()


async def retries(sidecar, store: str) -> float:
    """Records that had to be sent again, whatever the class."""
    metrics = await sidecar.metrics()
    return sum(v for k, v in metrics.items() if "store_retries_total{" in k and f'store="{store}"' in k)


async def finish(client, sidecar, stand, *broken: str) -> None:
    """Healed: send nothing more, drain, judge; the ``broken`` stores have counted what had to be sent again."""
    await client.stop()
    await sidecar.drained(90)
    for store in broken:
        await felt(sidecar, "store_retries_total", f'store="{store}"')
    await judge(client.history, stand, sidecar)


async def long_outage(row, stand, store: str, calls: int, without: str = "") -> None:
    """So many failed calls: with the default pace (30 s between two) 720 are six hours."""
    sidecar = stand.sidecar(retry=QUICK, phase=PHASE)
    async with Client(row, sidecar.url, workers=2, pause=0.05) as client:
        await start(sidecar, without=without)
        await client.acked(20)
        row.note("refuse", store=store)
        await refuse(stand, store)

        async def failed() -> float:
            return (await sidecar.metrics())[f'sidecar_store_write_seconds_count{{store="{store}"}}']

        await advances(failed, await failed() + calls, what="calls of a store that refuses")
        await heal(stand)
        await finish(client, sidecar, stand, *(() if without else (store,)))


@pytest.mark.timeout(1800)  # it ends by itself where the calls stand still
@pytest.mark.parametrize("store", [SQL, DYNAMO])
async def test_f11_an_outage_of_hours_loses_nothing(begin, stand, store):
    """F11: after 720 failed calls, six hours at the default pace, everything is delivered."""
    row = begin("F11")
    await long_outage(row, stand, store, 360 * row.rounds)


async def test_f11_control_retries_with_a_limit_are_found_guilty(begin, stand):
    """The control: dropped after 50 attempts."""
    with guilty("lost"):
        await long_outage(begin("F11"), stand, SQL, 120, "gives_up")


async def until_retried(sidecar, store: str, more: float = 1) -> None:
    """Wait until the trouble was felt: a fault that leaves no counter proves nothing."""
    wanted = await retries(sidecar, store) + more

    async def felt() -> bool:
        return await retries(sidecar, store) >= wanted

    await eventually(felt, seconds=60, what="a retry")


@pytest.mark.root
async def test_f12_packets_that_vanish_lose_nothing(begin, stand):
    """F12: PostgreSQL behind a cable that is cut under load, in an own network: no reset, no refusal, only silence."""
    row = begin("F12")
    async with cable(("127.0.0.1", stand.sql.port)) as wire:
        options = {"host": wire.host, "port": wire.port, "sslmode": "disable", "command_timeout": "1s", **PATIENCE}
        sidecar = stand.sidecar(retry=QUICK, phase=PHASE, postgres=options)
        async with Client(row, sidecar.url, workers=2, pause=0.05) as client:
            await start(sidecar)
            for _ in range(row.some(0.34)):
                await client.acked(20)
                row.note("cut the cable")
                await wire.cut()
                await until_retried(sidecar, SQL)
                await wire.join()
            await finish(client, sidecar, stand)


async def stopped_server(row, stand, postgres_server, without: str = "") -> None:
    """SIGSTOP of the whole server: connections stand, nothing answers; then it goes on."""
    sidecar = stand.sidecar(retry=QUICK, phase=PHASE, postgres={"command_timeout": "1s", **PATIENCE})
    async with Client(row, sidecar.url, workers=2, pause=0.05) as client:
        await start(sidecar, without=without)
        await client.acked(20)
        admin = await connect(stand.postgres)
        try:
            pids = [r[0] for r in await admin.fetch("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()")]
        finally:
            await admin.close()
        pids.append(int((postgres_server.directory / "pgdata" / "postmaster.pid").read_text().split()[0]))
        row.note("SIGSTOP", pids=pids)
        await asyncio.sleep(0.05)  # of load, so that something is under way
        for pid in reversed(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        try:
            if without:
                await client.acked(200)
                await asyncio.sleep(3)  # until the sabotaged one has given up what it could not send
            else:
                await until_retried(sidecar, SQL)
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        await finish(client, sidecar, stand)


@pytest.mark.root  # its processes belong to another account there
async def test_f12_a_server_that_stops_answering_loses_nothing(begin, stand, postgres_server):
    """F12: SIGSTOP of PostgreSQL, its backends and its postmaster; SIGCONT later."""
    await stopped_server(begin("F12"), stand, postgres_server)


@pytest.mark.root
async def test_f12_control_a_timeout_taken_for_success_is_found_guilty(begin, stand, postgres_server):
    """The control: no answer in time is taken for done."""
    with guilty("lost"):
        await stopped_server(begin("F12"), stand, postgres_server, "believes_lost_replies")


async def test_f12_replies_that_come_too_late_lose_nothing(begin, stand):
    """F12: both stores answer later than anybody waits, or never: nothing is lost, nothing is twice."""
    row = begin("F12")
    options = {SQL: {"command_timeout": "500ms"}, DYNAMO: {"connect_timeout": "300ms", "read_timeout": "300ms"}}
    sidecar = stand.sidecar(retry=QUICK, phase=PHASE, **options)
    async with Client(row, sidecar.url, workers=2, pause=0.05) as client:
        await start(sidecar)
        for fault in (Delay(2.0), Hang()):
            await client.acked(20)
            row.note("late", fault=str(fault))
            stand.dynamo.on("*", fault)
            stand.sql.latency = 0.4
            await until_retried(sidecar, DYNAMO)
            await until_retried(sidecar, SQL)
            stand.sql.latency = 0.0
            stand.dynamo.clear()
        await finish(client, sidecar, stand)


async def lost_replies(row, stand, rounds: int, without: str = "") -> int:
    """Requests that are done and not answered, alternately at both stores; how many rows were tried in vain."""
    admin = await connect(stand.postgres)
    try:
        if without:
            await admin.execute("ALTER TABLE integration_logs DROP CONSTRAINT integration_logs_pkey")
        await admin.execute(
            "CREATE TABLE attempts(log_id uuid);"
            "CREATE FUNCTION attempted() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN INSERT INTO attempts VALUES (NEW.log_id); RETURN NEW; END';"
            "CREATE TRIGGER attempted BEFORE INSERT ON integration_logs FOR EACH ROW EXECUTE FUNCTION attempted()"
        )
        sidecar = stand.sidecar(retry=QUICK, phase=PHASE)
        async with Client(row, sidecar.url, workers=2, pause=0.03) as client:
            await start(sidecar, without=without)
            for n in range(rounds):
                if n % 2:
                    before = stand.sql.lost
                    stand.sql.lose_reply(b"service-")
                    await eventually(lambda b=before: stand.sql.lost > b, what="a reply lost")
                else:
                    calls = stand.dynamo.calls["BatchWriteItem"]
                    stand.dynamo.on("BatchWriteItem", LoseReply(), times=1)
                    await eventually(lambda c=calls: stand.dynamo.calls["BatchWriteItem"] > c, what="a reply lost")
            await finish(client, sidecar, stand, SQL, DYNAMO)
        return await admin.fetchval("SELECT (SELECT count(*) FROM attempts) - (SELECT count(*) FROM integration_logs)")
    finally:
        await admin.close()


async def test_f13_a_reply_that_is_lost_makes_nothing_twice(begin, stand):
    """F13: done, not answered, sent again: a trigger sees the second attempt, the table holds each record once."""
    row = begin("F13")
    again = await lost_replies(row, stand, row.rounds)
    assert again >= row.rounds // 2, "records were never sent twice: the row proves nothing"


async def test_f13_control_without_key_and_conflict_clause_records_are_twice(begin, stand):
    """The control: plain inserts into a table without a key."""
    with guilty("twice"):
        await lost_replies(begin("F13"), stand, 6, "no_conflict_clause")


async def broken_connections(row, stand, rounds: int, without: str = "") -> None:
    """Replies cut in the middle of a frame, pooled connections reset, requests that never arrive."""
    sidecar = stand.sidecar(retry=QUICK, phase=PHASE)
    rng = row.rng
    async with Client(row, sidecar.url, workers=2, pause=0.03) as client:
        await start(sidecar, without=without)
        for _ in range(rounds):
            fault = rng.choice((CutReply(rng.randrange(1, 3)), Reset(), Raw(200, b"{"), Raw(502, b"<html>")))
            row.note("broken", fault=str(fault))
            calls = stand.dynamo.calls["BatchWriteItem"]
            stand.dynamo.on("BatchWriteItem", fault, times=1)
            if rng.random() < 0.5:
                stand.sql.cut_replies(after=rng.randrange(0, 60))
            stand.sql.kill_all()
            await eventually(lambda c=calls: stand.dynamo.calls["BatchWriteItem"] > c, what="the fault")
            await asyncio.sleep(rng.uniform(0, 0.05))
            await stand.sql.normal()
        await finish(client, sidecar, stand, *(() if without else (SQL, DYNAMO)))


async def test_f14_replies_cut_short_and_connections_reset_lose_nothing(begin, stand):
    """F14: at both stores, in the middle of frames and of pooled connections."""
    row = begin("F14")
    await broken_connections(row, stand, row.rounds)


async def test_f14_control_a_broken_call_taken_for_success_is_found_guilty(begin, stand):
    """The control: a reset before the request arrived is taken for done."""
    with guilty("lost"):
        await broken_connections(begin("F14"), stand, 10, "believes_lost_replies")


def refusals(rng, count: int) -> list:
    """What a throttled, failing or locked-out DynamoDB answers, one a call; between them right answers."""
    kinds = [
        lambda: Unprocess(rng.random()),
        lambda: Unprocess(0.0),
        lambda: Refuse(400, "ProvisionedThroughputExceededException"),
        lambda: Refuse(400, "ThrottlingException"),
        lambda: Refuse(400, "RequestLimitExceeded"),
        lambda: Refuse(500, "InternalServerError"),
        lambda: Refuse(503, "ServiceUnavailable"),
        lambda: Refuse(400, "ExpiredTokenException"),
        lambda: Refuse(400, "UnrecognizedClientException"),
        lambda: Refuse(400, "ResourceNotFoundException"),
        lambda: Refuse(400, "TransactionConflictException"),
    ]
    return [rng.choice(kinds)() if rng.random() < 0.7 else None for _ in range(count)]


async def refused_calls(row, stand, rounds: int, without: str = "", planted=None) -> None:
    """Answers at random that say no, wholly or in part."""
    faults = planted or refusals(row.rng, rounds)
    row.note("refusals", faults=[str(f) for f in faults])
    sidecar = stand.sidecar(retry=QUICK, phase=PHASE)
    async with Client(row, sidecar.url, workers=2, pause=0.05) as client:
        await start(sidecar, without=without)
        calls = stand.dynamo.calls["BatchWriteItem"]
        stand.dynamo.on("BatchWriteItem", *faults)

        async def made() -> float:
            return stand.dynamo.calls["BatchWriteItem"]

        await advances(made, calls + len(faults), what="calls, however few a second a store that refuses most is sent")
        await finish(client, sidecar, stand, *(() if without else (DYNAMO,)))


async def test_f15_throttling_errors_and_expired_keys_lose_nothing_and_make_no_dead_letter(begin, stand):
    """F15: unprocessed items, throttling, server errors, expired credentials, a table that is gone, at random."""
    row = begin("F15")
    await refused_calls(row, stand, row.rounds)


async def test_f15_control_unprocessed_items_that_are_ignored_are_found_guilty(begin, stand):
    """The control: what came back unprocessed is taken for stored."""
    with guilty("lost", "half"):
        await refused_calls(begin("F15"), stand, 4, "ignores_unprocessed", [Unprocess(0.4), None, Unprocess(0.2)])
