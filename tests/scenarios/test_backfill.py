"""Facts of ``sidecar backfill`` as processes see them: killed, throttled, stopped, beside live traffic; both ways.

Both stores are read with plain drivers (``tests.parts.oracle``); every record is compared, none sampled.
"""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest

from benchmarks.table_dynamodb import TableServer
from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.consistency.evidence import Validations
from sidecar.gaps import GapLine
from sidecar.record import LogRecord, to_dict
from sidecar.stores.dynamodb import DynamoDBStore
from sidecar.stores.postgres import PostgresStore
from sidecar.verdicts import DAY_US, DayVerdict, RunLine
from tests.parts import oracle
from tests.parts.adopted import old_rows
from tests.parts.dynamodb import CREDENTIALS
from tests.parts.fault_proxy import FaultProxy, Hang, Refuse, Reset, Unprocess
from tests.parts.nursery import NURSERY, Born
from tests.parts.postgres import connect
from tests.parts.sidecar import eventually, free_port
from tests.parts.tcp_proxy import TcpProxy
from tests.scenarios.conftest import Stand
from tests.stores.records import BASE, record

HOUR = 3_600_000_000
PG_TO_DYNAMO = ("--from", "postgres", "--to", "dynamodb")
DYNAMO_TO_PG = ("--from", "dynamodb", "--to", "postgres")


def history(number: int, hours: int = 40) -> list[LogRecord]:
    """Records over so many hours, each with every kind of field, in the order of time."""
    return [
        record(
            i,
            log_timestamp=BASE + i * hours * HOUR // number,
            service_name=f"service-{i % 5}",
            application_id=i % 7 or None,
            is_success=i % 11 != 0,
            request_data=f'{{"n": {i}, "x": 1.10}}',
            response_data="" if i % 2 else None,
            correlation_id=f"c-{i % 100}",
        )
        for i in range(number)
    ]


@pytest.fixture
async def dynamo(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TableServer]:
    """A DynamoDB that takes ten thousand records in seconds."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    async with TableServer() as server:
        yield server


@pytest.fixture
async def stand(tmp_path: Path, postgres: settings.Postgres, dynamo: TableServer) -> AsyncIterator[Stand]:
    """Created stores; ends every sidecar that the test started."""
    options = settings.DynamoDB(endpoint_url=dynamo.url, region="eu-west-1")
    store = DynamoDBStore(options, clock=SystemClock())
    await store.create()
    await store.close()
    async with TcpProxy(postgres.host, postgres.port) as sql, FaultProxy(dynamo.url) as proxy:
        made = Stand(tmp_path, postgres, options, sql, proxy)
        with contextlib.ExitStack() as stack:
            yield made
            for each in made.made:
                stack.callback(each.close)


class Runs:
    """Processes of ``sidecar backfill`` with the stand's configuration; past the fault proxy unless told otherwise."""

    def __init__(self, stand: Stand, started: list[Born], *, proxied: bool, **changes: Any) -> None:
        self.started = started
        self.outputs: dict[int, Path] = {}  # by process id
        if not proxied:
            changes["dynamodb"] = {"endpoint_url": stand.dynamodb.endpoint_url, **changes.get("dynamodb", {})}
        made = stand.sidecar("backfill", **changes)
        self.config = made.mount.directory / "config.yaml"
        self.log = stand.base / "backfill.log"
        self.environ = {**os.environ, "AWS_EC2_METADATA_DISABLED": "true"}

    def spawn(self, *arguments: str, environ: dict[str, str] | None = None) -> Born:
        """Start one; its JSON comes on stdout."""
        words = ["sidecar", "backfill", *arguments, "--config", str(self.config), "--json"]
        out = self.log.with_name(f"backfill.{len(self.started)}.out")
        process = NURSERY.launch(words, {**self.environ, **(environ or {})}, out, self.log)
        self.started.append(process)
        self.outputs[process.pid] = out
        return process

    async def ended(self, process: Born, seconds: float = 60.0) -> tuple[int, dict[str, Any]]:
        """Exit code and outcome."""
        try:
            code = await asyncio.to_thread(process.wait, seconds)
        finally:
            self.kill(process)
        out = self.outputs[process.pid].read_text()
        return code, json.loads(out) if out.strip() else {}

    async def run(self, *arguments: str, environ: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        """One from start to end."""
        return await self.ended(self.spawn(*arguments, environ=environ))

    async def clear(self, *arguments: str) -> int:
        """``sidecar clear-dynamodb``; the exit code."""
        words = ["sidecar", "clear-dynamodb", *arguments, "--config", str(self.config)]
        process = NURSERY.launch(words, self.environ, self.log)
        self.started.append(process)
        return await asyncio.to_thread(process.wait, 60)

    def kill(self, process: Born) -> None:
        """As the kernel does, where it has not ended."""
        process.send_signal(signal.SIGKILL)
        process.wait(10)


Make = Callable[..., Runs]


@pytest.fixture
def make(stand: Stand) -> Iterator[Make]:
    """Makes ``Runs``; ends every process that is left."""
    started: list[Born] = []
    yield lambda *, proxied=False, **changes: Runs(stand, started, proxied=proxied, **changes)
    for process in started:
        process.send_signal(signal.SIGKILL)
        process.wait(10)


async def in_postgres(stand: Stand, batch: Sequence[LogRecord]) -> None:
    """Put records into PostgreSQL."""
    store = PostgresStore(stand.postgres, clock=SystemClock())
    try:
        for at in range(0, len(batch), 1000):
            assert not (await store.write(batch[at : at + 1000])).failures
    finally:
        await store.close()


async def in_dynamodb(stand: Stand, batch: Sequence[LogRecord]) -> None:
    """Put records into DynamoDB."""
    store = DynamoDBStore(stand.dynamodb, clock=SystemClock())
    try:
        for at in range(0, len(batch), 25):
            assert not (await store.write(batch[at : at + 25])).failures
    finally:
        await store.close()


async def test_ten_thousand_adopted_rows_killed_twice_and_resumed_are_all_there_and_a_second_run_writes_none(
    stand: Stand, make: Make, dynamo: TableServer, specified: settings.Postgres, application: asyncpg.Connection
) -> None:
    """The specification's own table, 10,000 of its rows, two SIGKILLs: each is there once, under its computed id."""
    old = await old_rows(application, BASE, 9_500)
    old += await old_rows(application, BASE + 40 * DAY_US - 25_000_000, 500)  # the last of them on another day
    adopt = {"enabled": True, "assume_zone": "UTC", "status_code_text": True}
    runs = make(postgres={"database": specified.database, "table": specified.table, "adopt": adopt})
    for share in (2_500, 6_000):
        process = runs.spawn(*PG_TO_DYNAMO, "--rate", "2000")
        await eventually(lambda share=share: dynamo.state.puts > share, seconds=60, what="half-way")
        runs.kill(process)
    code, told = await runs.run(*PG_TO_DYNAMO, "--rate", "none")
    assert (code, told["good"], told["missing_after"]) == (0, True, 0)
    assert told["looked_at"] == 10_000  # the survey was not begun anew
    oracle.assert_same({r.log_id: to_dict(r) for r in old}, await stand.in_dynamodb())
    puts = dynamo.state.puts
    assert puts < 10_100  # every record once, and checkpoints: what a kill made it repeat met its condition
    code, told = await runs.run(*PG_TO_DYNAMO, "--rate", "none")
    assert (code, told["copied"], told["present"], told["missing_before"]) == (0, 0, 0, 0)
    assert dynamo.state.puts < puts + 50  # checkpoints alone


@pytest.mark.parametrize("way", [PG_TO_DYNAMO, (*DYNAMO_TO_PG, "--hours", "all")], ids=["there", "back"])
async def test_a_kill_leaves_no_verdict_standing_of_a_day_that_was_written_to(
    stand: Stand, make: Make, way: tuple[str, ...]
) -> None:
    """Killed between the note and the first write, and again in the middle: every day that got a record is stale."""
    batch = history(400, hours=40 * 24)
    await (in_postgres if way == PG_TO_DYNAMO else in_dynamodb)(stand, batch)
    there = stand.in_dynamodb if way == PG_TO_DYNAMO else stand.in_postgres
    days = {r.log_timestamp // DAY_US for r in batch}
    store = DynamoDBStore(stand.dynamodb, clock=SystemClock())
    evidence = Validations(store.verdicts, SystemClock())

    async def stale() -> set[int]:
        found = await evidence.days()
        assert found is not None
        return set(found.stale) & days

    try:
        now = SystemClock().now_us()
        verdicts = [
            DayVerdict(
                day=d, started_us=now, finished_us=now, until_us=(d + 1) * DAY_US, sql_records=1, dynamo_records=1
            )
            for d in days
        ]
        await store.verdicts.put_days(verdicts)
        line = RunLine(id="all", start_us=0, end_us=now, everything=True, started_us=now, finished_us=now)
        await store.verdicts.put_run(line)
        assert await stale() == set()
        stand.dynamo.on("UpdateItem", *[None] * 3, Hang())  # a note is an UpdateItem: the fourth is never answered
        runs = make(proxied=True)
        process = runs.spawn(*way, "--rate", "40")
        await eventually(lambda: stand.dynamo.calls["UpdateItem"] > 3, seconds=60, what="the days are being noted")
        runs.kill(process)
        held, noted = await there(), await stale()
        written = {r.log_timestamp // DAY_US for r in batch if r.log_id in held}
        assert written <= noted
        assert noted < days
        stand.dynamo.clear()
        process = runs.spawn(*way, "--rate", "40")

        async def some() -> bool:
            return len(await there()) > 100

        await eventually(some, seconds=60, every=0.5, what="some are copied")
        runs.kill(process)
        held = await there()
        assert len(held) < 400
        assert {r.log_timestamp // DAY_US for r in batch if r.log_id in held} <= await stale()
    finally:
        await store.close()


async def test_sigterm_ends_with_a_checkpoint_and_the_next_process_goes_on(
    stand: Stand, make: Make, dynamo: TableServer
) -> None:
    """Exit 1, not 0, so that no Job takes it for done; the next run copies the rest alone, and pause holds it."""
    await in_postgres(stand, history(1_500, hours=6))
    runs = make()
    process = runs.spawn(*PG_TO_DYNAMO, "--rate", "300")
    await eventually(lambda: dynamo.state.puts > 200, seconds=60, what="some are copied")
    process.send_signal(signal.SIGTERM)
    code, first = await runs.ended(process)
    assert (code, first["stage"], first["good"]) == (1, "copy", False)
    assert first["copied"] == len(await stand.in_dynamodb()) < 1_500
    assert (await runs.run("pause", "--why", "lunch"))[1]["reason"] == "lunch"
    ops = free_port()
    process = runs.spawn(*PG_TO_DYNAMO, "--rate", "none", "--ops", f"127.0.0.1:{ops}")
    await eventually(lambda: b" (lunch)" in runs.log.read_bytes(), seconds=30, what="held")
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{ops}/metrics") as answer:
        metrics = (await answer.text()).splitlines()
    assert 'sidecar_backfill_stage{stage="copy"} 1.0' in metrics
    assert f"sidecar_backfill_left_records {1_500.0 - first['copied']}" in metrics
    assert f'sidecar_backfill_records_total{{result="copied"}} {float(first["copied"])}' in metrics
    assert (await runs.run("status"))[1]["jobs"][0]["checkpoints"][0]["copied"] < 1_500
    await runs.run("resume")
    code, told = await runs.ended(process)
    assert (code, told["good"]) == (0, True)
    assert told["present"] <= 8 * 25  # at most what each of eight workers had begun
    oracle.assert_same(await stand.in_postgres(), await stand.in_dynamodb())


@pytest.mark.parametrize("fault", [Reset(), Hang()], ids=repr)
async def test_sigterm_ends_it_although_the_destination_is_gone(stand: Stand, make: Make, fault: Reset | Hang) -> None:
    """In seconds, with exit 1; the next run copies what is left."""
    await in_postgres(stand, history(600, hours=6))
    runs = make(proxied=True, dynamodb={"connect_timeout": "1s", "read_timeout": "2s"})
    process = runs.spawn(*PG_TO_DYNAMO, "--rate", "200")
    await eventually(lambda: stand.dynamo.applied["PutItem"] > 100, seconds=60, what="some are copied")
    stand.dynamo.on("*", fault)
    calls = stand.dynamo.calls.total()
    await eventually(lambda: stand.dynamo.calls.total() > calls + 4, seconds=30, what="it has noticed")
    process.send_signal(signal.SIGTERM)
    code, _ = await runs.ended(process, seconds=20)
    assert code == 1
    stand.dynamo.clear()
    code, told = await runs.ended(runs.spawn(*PG_TO_DYNAMO))
    assert (code, told["good"]) == (0, True)


async def test_sigterm_ends_it_although_both_stores_are_gone(stand: Stand, make: Make) -> None:
    """On the way back too, where the source is read in one piece and fails at once, again and again."""
    await in_dynamodb(stand, history(600, hours=6))
    runs = make(proxied=True, dynamodb={"connect_timeout": "1s", "read_timeout": "2s"}, retry={"max_delay": "1s"})
    process = runs.spawn(*DYNAMO_TO_PG, "--hours", "all", "--rate", "100")

    async def some() -> bool:
        return len(await stand.in_postgres()) > 50

    await eventually(some, seconds=60, every=0.2, what="some are copied")
    stand.dynamo.on("*", Reset())
    await stand.sql.refuse()
    calls = stand.dynamo.calls.total()
    await eventually(lambda: stand.dynamo.calls.total() > calls + 4, seconds=30, what="it has noticed")
    process.send_signal(signal.SIGTERM)
    code, _ = await runs.ended(process, seconds=20)
    assert code == 1


async def test_a_store_that_throttles_gets_everything_and_a_bound_on_capacity_is_kept(stand: Stand, make: Make) -> None:
    """ProvisionedThroughputExceeded on the way in, UnprocessedKeys and throttling on the way back: all arrive."""
    batch = history(300, hours=10)
    await in_postgres(stand, batch)
    stand.dynamo.on("PutItem", *[Refuse(400, "ProvisionedThroughputExceededException"), None, None] * 30)
    runs = make(proxied=True)
    code, told = await runs.run(*PG_TO_DYNAMO, "--rate", "none", "--capacity", "2000")
    assert (code, told["good"], told["copied"]) == (0, True, 300)
    oracle.assert_same(await stand.in_postgres(), await stand.in_dynamodb())

    await gap(stand, {r.log_timestamp // HOUR for r in batch})
    await empty_postgres(stand)
    stand.dynamo.on("BatchGetItem", *[Unprocess(0.3, 1), Refuse(400, "ThrottlingException")], times=3)
    code, told = await runs.run(*DYNAMO_TO_PG, "--rate", "none")
    assert (code, told["good"], told["copied"], told["gap_records_closed"]) == (0, True, 300, 300)
    oracle.assert_same(await stand.in_postgres(), await stand.in_dynamodb())


async def test_copying_back_takes_exactly_the_hours_that_postgresql_was_not_given(
    stand: Stand, make: Make, dynamo: TableServer
) -> None:
    """Phase 3's hours alone, killed and resumed; their gaps close, the one of the other store stays open."""
    batch = history(3_000, hours=20)
    await in_dynamodb(stand, batch)
    hours = sorted({r.log_timestamp // HOUR for r in batch})
    late = [r for r in batch if r.log_timestamp // HOUR >= hours[8]]
    await gap(stand, {r.log_timestamp // HOUR for r in late}, number=len(late))
    await gap(stand, {hours[0]}, store="dynamodb")
    runs = make()
    process = runs.spawn(*DYNAMO_TO_PG, "--rate", "1000")

    async def some() -> bool:
        return len(await stand.in_postgres()) > 300

    await eventually(some, seconds=60, what="some are copied")
    runs.kill(process)
    code, told = await runs.run(*DYNAMO_TO_PG, "--rate", "none")
    assert (code, told["good"], told["looked_at"]) == (0, True, len(late))
    found = await stand.in_postgres()
    oracle.assert_same(found, {r: f for r, f in (await stand.in_dynamodb()).items() if r in found})
    assert found.keys() == {r.log_id for r in late}
    assert await open_gaps(stand) == {("dynamodb", hours[0])}
    code, told = await runs.run(*DYNAMO_TO_PG, "--rate", "none")
    assert (code, told["copied"], told["looked_at"]) == (0, 0, 0)  # no gap is open: nothing to do


async def test_shards_of_an_indexed_job_copy_every_record_once_between_them(
    stand: Stand, make: Make, dynamo: TableServer
) -> None:
    """Three pods with JOB_COMPLETION_INDEX: their copies add up to the whole, and no record is put by two of them."""
    await in_postgres(stand, history(1_200))
    runs = make()
    ended = await asyncio.gather(
        *(
            runs.run(*PG_TO_DYNAMO, "--shards", "3", "--rate", "none", environ={"JOB_COMPLETION_INDEX": str(index)})
            for index in range(3)
        )
    )
    told = [each for _, each in ended]
    assert [code for code, _ in ended] == [0, 0, 0]
    assert sum(each["copied"] for each in told) == 1_200
    assert [each["present"] for each in told] == [0, 0, 0]
    assert all(each["copied"] > 100 for each in told)
    oracle.assert_same(await stand.in_postgres(), await stand.in_dynamodb())


async def test_what_dynamodb_would_refuse_is_told_before_anything_is_copied(
    stand: Stand, make: Make, dynamo: TableServer
) -> None:
    """Over-size rows with id and bytes, exit 1, nothing put; with --skip-refused all the others, and the gap stays."""
    batch = history(300, hours=5)
    batch[7] = record(7, log_timestamp=batch[7].log_timestamp, request_data="x" * 410_000)
    await in_postgres(stand, batch)
    await gap(stand, {r.log_timestamp // HOUR for r in batch})
    runs = make()
    code, told = await runs.run(*PG_TO_DYNAMO)
    assert (code, told["copied"], told["refused"]) == (1, 0, {"ItemTooLarge": 1})
    assert f"refused: {batch[7].log_id}: the item has 410" in runs.log.read_text()
    assert await stand.in_dynamodb() == {}
    code, told = await runs.run(*PG_TO_DYNAMO, "--skip-refused", "--rate", "none")
    assert (code, told["copied"], told["refused"], told["missing_after"]) == (1, 299, {"ItemTooLarge": 1}, 1)
    assert await open_gaps(stand) == {("postgres", r.log_timestamp // HOUR) for r in batch}


async def test_live_writes_of_the_same_ids_are_never_overwritten(stand: Stand, make: Make, dynamo: TableServer) -> None:
    """Other content arrives live under every third id while the backfill copies: DynamoDB keeps the live one."""
    batch = history(900, hours=6)
    await in_postgres(stand, batch)
    live = [record(i, log_timestamp=r.log_timestamp, user_id="live") for i, r in enumerate(batch) if i % 3 == 0]
    runs = make()
    process = runs.spawn(*PG_TO_DYNAMO, "--rate", "600")
    await eventually(lambda: dynamo.state.puts > 100, seconds=60, what="it copies")
    await in_dynamodb(stand, live)
    code, told = await runs.ended(process)
    found = await stand.in_dynamodb()
    assert {i for i, fields in found.items() if fields["user_id"] == "live"} == {r.log_id for r in live}
    assert (code, told["missing_after"], told["differing"], len(found)) == (1, 0, 300, 900)  # and it says so


async def test_dynamodb_is_cleared_and_made_again_where_nothing_can_be_lost(stand: Stand, make: Make) -> None:
    """Refused with a record that DynamoDB alone holds; then the table is new, and a backfill closes its gap."""
    batch = history(200, hours=5)
    await in_postgres(stand, batch)
    await in_dynamodb(stand, [*batch, record(999)])
    runs = make(phase="dual_write")
    typed = ("--table", stand.dynamodb.table, "--why", "rebuild")
    assert await runs.clear(*typed) == 2
    assert "1 records are in DynamoDB alone" in runs.log.read_text()
    assert len(await stand.in_dynamodb()) == 201
    await in_postgres(stand, [record(999)])
    assert await runs.clear("--table", "logs", "--why", "rebuild") == 2
    assert await runs.clear(*typed) == 0
    assert await stand.in_dynamodb() == {}
    assert {("dynamodb", r.log_timestamp // HOUR) for r in batch} <= await open_gaps(stand)
    code, told = await runs.run(*PG_TO_DYNAMO, "--rate", "none")
    assert (code, told["copied"]) == (0, 201)
    oracle.assert_same(await stand.in_postgres(), await stand.in_dynamodb())
    assert await open_gaps(stand) == set()


async def gap(stand: Stand, hours: set[int], *, store: str = "postgres", number: int | None = None) -> None:
    """Open gaps of a store: ``number`` records over all the hours, or as many as DynamoDB or PostgreSQL holds."""
    held = await stand.in_dynamodb() or await stand.in_postgres()
    total = len(held) if number is None else number
    share = [total // len(hours) + (i < total % len(hours)) for i in range(len(hours))]
    lines = [
        GapLine(store=store, kind="not_owed", hour=hour, source="test", opened=n)
        for hour, n in zip(sorted(hours), share, strict=True)
    ]
    keeper = DynamoDBStore(stand.dynamodb, clock=SystemClock())
    try:
        await keeper.gap_ledger.put_gaps(lines)
    finally:
        await keeper.close()


async def open_gaps(stand: Stand) -> set[tuple[str, int]]:
    """Store and hour of each open line of both ledgers."""
    dynamo = DynamoDBStore(stand.dynamodb, clock=SystemClock())
    postgres = PostgresStore(stand.postgres, clock=SystemClock())
    try:
        lines = [*await dynamo.gap_ledger.gaps(), *await postgres.gap_ledger.gaps()]
        return {(line.store, line.hour) for line in lines}
    finally:
        await dynamo.close()
        await postgres.close()


async def empty_postgres(stand: Stand) -> None:
    """As if nothing had ever been delivered there."""
    connection = await connect(stand.postgres)
    try:
        await connection.execute("TRUNCATE integration_logs")
    finally:
        await connection.close(timeout=5)
