"""Several sidecars of one fleet under load, read all the time, and what must be true of them whoever is stopped.

::

    async with crew(stand, http, "abc", phase="dual_write") as fleet:       three processes
        async with fleet.load():                                              clients that write to and read from each
            fleet.stop("b")                                                   SIGSTOP; ``go_on`` is SIGCONT
            fleet.swap("dual_write_read_dynamo", "a", "c")                    kubelet's swap, at some of them
            await fleet.reaches("dual_write_read_dynamo", "a", "c")
            fleet.go_on("b")
        await fleet.judge()

THE JUDGEMENT (``judge``) knows nothing of the product's bookkeeping: it reads both stores and both ledgers past the
sidecars. Every record that was answered with 2xx is in both stores, or is in one and counted in the other's gap ledger;
the ledger counts nothing that is not missing, but for its head start of a tenth and what was counted again after a
stop; no read asked a store that is not owed a record that every required store of its writer had confirmed before; and
what waited for a stopped instance, while the others went where DynamoDB is owed everything, is in DynamoDB.
Records lie in a few hours of the past, so that gaps can be counted by hour.
"""

import asyncio
import json
import random
import signal
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import aioboto3
import aiohttp
import msgspec

from sidecar.clock import SystemClock
from sidecar.gaps import summed
from sidecar.stores.dynamodb import DynamoDBStore
from sidecar.stores.postgres import PostgresStore
from tests.parts import oracle
from tests.parts.postgres import connect
from tests.parts.sidecar import Sidecar, eventually

HOURS: Final = tuple(f"2025-01-01T{hour:02d}" for hour in range(3))
_RECENT: Final = 300  # records that readers choose from
_BATCH: Final = 3
_PAUSE: Final = 0.05  # seconds between a client's requests: the stores are emulated, and read whole at the end
QUICK: Final[dict[str, Any]] = {
    "fleet": {"enabled": True, "heartbeat": "200ms", "fence_after": "2s"},
    "postgres": {"connect_timeout": "500ms", "command_timeout": "1s"},
    "dynamodb": {"connect_timeout": "500ms", "read_timeout": "1s"},
}


@dataclass(frozen=True)
class Missed:
    """A read that did not find what had been confirmed before it began."""

    log_id: str
    pod: str
    store: str  # that was read
    phase: str  # of the reader
    written: str  # where, and in which phase


@dataclass
class Crew:
    """See the module."""

    stand: Any
    http: aiohttp.ClientSession
    pods: dict[str, Sidecar]
    acked: dict[str, str] = field(default_factory=dict)  # log_id -> instance and phase, as answered
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=_RECENT))  # confirmed by every required store
    missed: list[Missed] = field(default_factory=list)
    found: Counter[tuple[str, str]] = field(default_factory=Counter)  # (instance, store) of reads answered 200
    refused: Counter[tuple[str, int, str]] = field(default_factory=Counter)  # (instance, status, code) of other answers
    copied: set[tuple[str, str]] = field(default_factory=set)  # (log_id, store) that ``fill`` put there
    hours: Sequence[str] = HOURS  # of the records' log_timestamp
    writing: asyncio.Event = field(default_factory=asyncio.Event)  # cleared: writers pause
    late: set[str] = field(default_factory=set)  # acknowledged of what waited for an instance that was stopped

    def __getitem__(self, name: str) -> Sidecar:
        return self.pods[name]

    # --- what is done to them --------------------------------------------------------------------------------------

    def swap(self, phase: str, *names: str, **settings: Any) -> None:
        """Another configuration at some (all where none is named), as kubelet delivers it."""
        for name in names or self.pods:
            self.pods[name].configure(phase=phase, **settings)

    def stop(self, name: str) -> None:
        """SIGSTOP: nothing runs; its sockets stay open and take what clients send."""
        self._signal(name, signal.SIGSTOP)

    def go_on(self, name: str) -> None:
        """SIGCONT."""
        self._signal(name, signal.SIGCONT)

    def _signal(self, name: str, number: signal.Signals) -> None:
        process = self.pods[name].process
        assert process is not None
        process.send_signal(number)

    @asynccontextmanager
    async def load(self) -> AsyncIterator[None]:
        """Clients that write and read at every instance until the block ends."""
        done = asyncio.Event()
        self.writing.set()
        tasks = [asyncio.create_task(client(name, done)) for name in self.pods for client in (self._write, self._read)]
        try:
            yield
        finally:
            done.set()
            await asyncio.wait(tasks, timeout=30)
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [each for each in outcomes if each is not None], outcomes

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        """Nobody writes, and everything that was written is delivered; reads go on."""
        self.writing.clear()
        for pod in self.pods.values():
            await pod.drained()
        yield
        self.writing.set()

    async def command(self, name: str, *arguments: str) -> str:
        """A command of the product with an instance's configuration; what it prints. It must succeed."""
        done = await self.pods[name].command(*arguments, seconds=40)
        assert done.returncode == 0, (arguments, done)
        return done.stdout

    async def writes(self, *names: str, n: int = 30) -> None:
        """Await that each of some (all where none is named) has acknowledged ``n`` more records."""
        goals = {name: self._acked_by(name) + n for name in names or self.pods}
        await eventually(
            lambda: all(self._acked_by(name) >= goal for name, goal in goals.items()), what=f"acknowledged by {goals}"
        )

    async def reads(self, store: str, *names: str, n: int = 10) -> None:
        """Await that each of some (all where none is named) has answered ``n`` more reads from a store."""
        goals = {name: self.found[name, store] + n for name in names or self.pods}
        await eventually(
            lambda: all(self.found[name, store] >= goal for name, goal in goals.items()),
            what=f"{store} read by {goals}",
        )

    def _acked_by(self, name: str) -> int:
        return sum(where.startswith(f"{name} ") for where in self.acked.values())

    async def _write(self, name: str, done: asyncio.Event) -> None:
        number = 0
        while not done.is_set():
            number += 1
            await self.writing.wait()
            await self._post(name, number)
            await asyncio.sleep(_PAUSE)

    async def _post(self, name: str, number: int) -> Sequence[str]:
        """The ids that were acknowledged."""
        batch = [
            {
                "log_id": str(uuid.uuid4()),
                "log_timestamp": f"{random.choice(self.hours)}:{number % 60:02d}:00Z",
                "service_name": "orders",
                "application_id": number,
                "request_data": name,
            }
            for _ in range(_BATCH)
        ]
        try:
            async with self.http.post(
                f"{self.pods[name].url}/logs", json=batch, headers={"Prefer": "wait=1"}
            ) as answer:
                document = await answer.json(content_type=None)
                status = answer.status
        except aiohttp.ClientError:  # killed, or being started
            return ()
        if status not in (201, 202):
            self.refused[name, status, document["error"]["code"]] += 1
            return ()
        ids = [str(record["log_id"]) for record in batch]
        self.acked.update(dict.fromkeys(ids, f"{name} {document['phase']} {status}"))
        if status == 201:
            self.recent.extend(ids)
        return ids

    async def _read(self, name: str, done: asyncio.Event) -> None:
        while not done.is_set():
            await asyncio.sleep(_PAUSE)
            if self.recent:
                await self._ask(name, random.choice(self.recent))

    async def _ask(self, name: str, log_id: str) -> None:
        try:
            async with self.http.get(f"{self.pods[name].url}/logs/{log_id}") as answer:
                document = await answer.json(content_type=None)
                store, phase = answer.headers.get("X-Served-By", ""), answer.headers.get("X-Phase", "")
                status = answer.status
        except aiohttp.ClientError:  # killed, or being started
            return
        if status == 200:
            self.found[name, store] += 1
        elif status == 404:
            self.missed.append(Missed(log_id, name, store, phase, self.acked[log_id]))
        else:
            self.refused[name, status, document["error"]["code"]] += 1

    @asynccontextmanager
    async def waiting(self, name: str, n: int = 20) -> AsyncIterator[None]:
        """Writes, and reads of what was confirmed last, wait for an instance that is stopped; answered by the end."""
        asked = [self._ask(name, log_id) for log_id in list(self.recent)[-n:]]
        tasks = [asyncio.create_task(call) for call in (*asked, *(self._post(name, number) for number in range(n)))]
        await asyncio.sleep(0.1)  # the requests lie in its sockets; nobody could tell when
        yield
        await asyncio.gather(*tasks)
        self.late |= {log_id for task in tasks for log_id in task.result() or ()}

    # --- what they say ---------------------------------------------------------------------------------------------

    async def phase(self, name: str) -> dict[str, Any]:
        """The phase's part of an instance's ``/status``."""
        document: dict[str, Any] = (await self.pods[name].json("/status"))["phase"]
        return document

    async def reaches(self, phase: str, *names: str, seconds: float = 20.0) -> None:
        """Await that some (all where none is named) have applied a phase and are not fenced."""
        for name in names or self.pods:
            seen: dict[str, Any] = {}

            async def there(name: str = name, seen: dict[str, Any] = seen) -> bool:
                seen.update(await self.phase(name))
                return seen["applied"] == phase and not seen["fleet"]["fenced"]

            try:
                await eventually(there, seconds=seconds, every=0.1)
            except AssertionError:
                raise AssertionError(f"{name} is not in {phase}: {seen}") from None

    async def fenced(self, name: str) -> None:
        """Await that an instance has lost touch."""

        async def alone() -> bool:
            return bool((await self.phase(name))["fleet"]["fenced"])

        await eventually(alone, every=0.1, what=f"{name} fenced")

    async def held(self, gate: str, *names: str, seconds: float = 20.0) -> None:
        """Await that whoever leads among some (all where none is named) gives a reason for not moving."""
        seen: list[Any] = []

        async def said() -> bool:
            seen[:] = [(await self.phase(name))["fleet"] for name in names or self.pods]
            return any(hold["gate"] == gate for each in seen if each["leads"] for hold in each["holds"])

        try:
            await eventually(said, seconds=seconds, every=0.1)
        except AssertionError:
            raise AssertionError(f"not held by {gate}: {seen}") from None

    async def shows_gaps(self, *, open_now: bool) -> None:
        """Await that every instance's metrics say that some gap is open, or that none is."""
        for pod in self.pods.values():

            async def said(pod: Sidecar = pod) -> bool:
                seen = await pod.metrics()
                return open_now is any(n for name, n in seen.items() if name.startswith("sidecar_open_gap_records"))

            await eventually(said, every=0.1, what=f"gaps open on {pod.url}: {open_now}")

    async def told(self, gate: str, *, seconds: float = 20.0) -> None:
        """Await that every instance, whoever is asked, names the same leader and this reason."""
        seen: list[Any] = []

        async def said() -> bool:
            seen[:] = [await self.phase(name) for name in self.pods]
            gates = [{hold["gate"] for hold in each["fleet"]["holds"]} for each in seen]
            leaders = {each["fleet"]["leader"] for each in seen}
            return all(gate in each for each in gates) and len(leaders) == 1 and None not in leaders

        try:
            await eventually(said, seconds=seconds, every=0.1)
        except AssertionError:
            raise AssertionError(f"not everybody tells {gate}: {seen}") from None

    # --- what the stores say, read past the sidecars ---------------------------------------------------------------

    async def settles(self, phase: str, seconds: float = 20.0) -> dict[str, Any]:
        """Await that both copies are the same record of this phase, settled; returns it."""
        seen: list[Any] = []

        async def settled() -> bool:
            seen[:] = [await self._documents("fleet", store) for store in ("postgres", "dynamodb")]
            first, second = seen
            return bool(first) and first == second and first[0]["settled"] and first[0]["phase"] == _NUMBERS[phase]

        try:
            await eventually(settled, seconds=seconds, every=0.1)
        except AssertionError:
            raise AssertionError(f"not settled in {phase}: {seen}") from None
        record: dict[str, Any] = seen[0][0]
        return record

    async def walk(self) -> list[tuple[int, int]]:
        """Every step that was made, (from, to), in the order of epochs, by the trails of both stores."""
        lines = [line for store in ("postgres", "dynamodb") for line in await self._documents("audit", store)]
        lines.sort(key=lambda line: line["epoch"])
        return [
            (line["from_phase"], line["to_phase"])
            for line in lines
            if line["action"] == "step" and line["outcome"] == "done"
        ]

    async def _documents(self, what: str, store: str) -> list[dict[str, Any]]:
        if store == "dynamodb":
            return [json.loads(item["document"]["S"]) for item in await self._items(what)]
        rows = await self._rows(f"SELECT document FROM integration_logs_{what}")
        return [json.loads(row[0]) for row in rows]

    async def _rows(self, sql: str) -> list[Any]:
        connection = await connect(self.stand.postgres)
        try:
            return list(await connection.fetch(sql))
        finally:
            await connection.close(timeout=5)

    async def _items(self, partition: str) -> list[dict[str, Any]]:
        session = aioboto3.Session(
            aws_access_key_id="test", aws_secret_access_key="test", region_name=self.stand.dynamodb.region
        )
        async with session.client("dynamodb", endpoint_url=self.stand.dynamodb.endpoint_url) as client:
            answer = await client.query(
                TableName=self.stand.dynamodb.fleet_table,
                KeyConditionExpression="pk = :pk",
                ExpressionAttributeValues={":pk": {"S": partition}},
                ConsistentRead=True,
            )
        items: list[dict[str, Any]] = answer["Items"]
        return items

    async def ledger(self) -> Counter[tuple[str, int]]:
        """(store that misses, hour) -> records, as both ledgers together have them open."""
        lines: dict[tuple[str, ...], tuple[int, int]] = {}
        for row in await self._rows(
            "SELECT store, kind, hour::text, source, opened, closed FROM integration_logs_gaps"
        ):
            _merge(lines, tuple(row)[:4], row["opened"], row["closed"])
        for item in await self._items("gaps"):
            key = tuple(item["sk"]["S"].split("#", 3))
            _merge(lines, key, int(item["opened"]["N"]), int(item["closed"]["N"]))
        found: Counter[tuple[str, int]] = Counter()
        for (store, _, hour, _), (opened, closed) in lines.items():
            if opened > closed:
                found[store, int(hour)] += opened - closed
        return found

    async def fill(self, store: str) -> None:
        """Copy what a store misses from the other one and close its gaps: the backfill and its validation."""
        postgres = PostgresStore(self.stand.postgres, clock=SystemClock())
        dynamodb = DynamoDBStore(self.stand.dynamodb, clock=SystemClock())
        source, target = (postgres, dynamodb) if store == "dynamodb" else (dynamodb, postgres)
        try:
            lines = [
                line
                for line in summed([*await postgres.fleet.gaps(), *await dynamodb.fleet.gaps()])
                if line.store == store
            ]
            held = await (self.stand.in_dynamodb() if store == "dynamodb" else self.stand.in_postgres())
            there = await (self.stand.in_postgres() if store == "dynamodb" else self.stand.in_dynamodb())
            for log_id in there.keys() - held.keys():
                record = await source.get(log_id)
                assert record is not None
                await target.put_if_absent([record])
                self.copied.add((log_id, store))
            closed = [msgspec.structs.replace(line, closed=line.opened) for line in lines]
            for each in (postgres, dynamodb):
                await each.fleet.put_gaps(closed)
        finally:
            await postgres.close()
            await dynamodb.close()

    async def judge(self, *, again: int = 0) -> None:
        """The judgement of this module's head; ``again`` is how many records a stopped instance may count twice."""
        for pod in self.pods.values():
            await pod.drained()
        stores = {"postgres": await self.stand.in_postgres(), "dynamodb": await self.stand.in_dynamodb()}
        sql, dynamo = stores.values()
        oracle.assert_holds(sql | dynamo, self.acked)
        both = sql.keys() & dynamo.keys()
        oracle.assert_same({i: sql[i] for i in both}, {i: dynamo[i] for i in both})
        missing = Counter(
            (name, _hour(fields["log_timestamp"]))
            for name, held in stores.items()
            for log_id, fields in (sql | dynamo).items()
            if log_id not in held
        )
        ledger = await self.ledger()
        hidden = {key: (n, ledger[key]) for key, n in missing.items() if ledger[key] < n}
        assert not hidden, f"missing, and the gap ledger does not say so: {hidden}"
        invented = {key: (missing[key], n) for key, n in ledger.items() if n > missing[key] * 1.25 + _PER_HOUR + again}
        assert not invented, f"the gap ledger says more than is missing: {invented}"
        unsafe = [m for m in self.missed if m.log_id not in stores[m.store] or (m.log_id, m.store) in self.copied]
        assert not unsafe, f"{len(unsafe)} unsafe reads, e.g. {unsafe[:3]}"
        old = [self.acked[log_id] for log_id in self.late if log_id not in dynamo]
        assert not old, f"{len(old)} stamped for a phase that was gone, e.g. {old[:3]}"


_NUMBERS: Final = {"sql_only": 0, "dual_write": 1, "dual_write_read_dynamo": 2, "dynamo_only": 3}
_PER_HOUR: Final = 20  # the head start of hours with few records


def _merge(lines: dict[tuple[str, ...], tuple[int, int]], key: tuple[str, ...], opened: int, closed: int) -> None:
    known = lines.get(key, (0, 0))
    lines[key] = max(known[0], opened), max(known[1], closed)


def _hour(timestamp: str) -> int:
    return int(datetime.fromisoformat(timestamp).astimezone(UTC).timestamp()) // 3600


@asynccontextmanager
async def crew(
    stand: Any,
    http: aiohttp.ClientSession,
    names: Iterable[str],
    *,
    phase: str,
    unfenced: Collection[str] = (),
    own: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: Any,
) -> AsyncIterator[Crew]:
    """Instances that have all joined; their processes end with the stand.

    Those ``unfenced`` lack the fence; ``own`` are sections of the configuration of single instances.
    """
    pods = {}
    for name in names:
        mine = (own or {}).get(name, {})
        sections = {key: {**QUICK.get(key, {}), **settings.get(key, {}), **mine.get(key, {})} for key in QUICK}
        rest = {key: value for key, value in settings.items() if key not in QUICK}
        pods[name] = stand.sidecar(name, instance=name, phase=phase, **sections, **rest)
    for name, pod in pods.items():
        pod.module = "tests.scenarios.unfenced" if name in unfenced else "sidecar"
        pod.spawn()
    for pod in pods.values():
        await pod.ready()
    made = Crew(stand, http, pods)
    await made.reaches(phase)
    try:
        yield made
    finally:
        for name, pod in made.pods.items():
            if pod.process is not None and pod.process.poll() is None:
                made.go_on(name)
