"""The main job, end to end: a real process, real stores, what the application and the stores see."""

import asyncio
import contextlib
import gzip
import json
import signal
import uuid

import aiohttp
import asyncpg
import pytest

from tests.parts import oracle
from tests.parts.account import adds_up, watching
from tests.parts.fault_proxy import Hang, LoseReply, Refuse, Unprocess
from tests.parts.postgres import connect
from tests.parts.sidecar import eventually

PAYLOAD = '{"b":1.10, "a":[1,2 ], "b":"twice", "\\u00e9":"\\ud83d\\ude00"}'


def body(n: int, **fields) -> dict:
    """A record of about 300 bytes."""
    return {
        "service_name": f"service-{n % 7}",
        "application_id": n,
        "response_data": "x" * 200,
        "status_code": 200,
        "processing_time_ms": n,
        "correlation_id": f"c-{n}",
        **fields,
    }


async def post(http, sidecar, data, *, status=202, kind="application/json", **headers):
    """POST and return the answer's document; the status must be as said."""
    raw = data if isinstance(data, bytes | str) else json.dumps(data)
    async with http.post(f"{sidecar.url}/logs", data=raw, headers={"Content-Type": kind, **headers}) as answer:
        text = await answer.text()
        assert answer.status == status, text
        return json.loads(text)


async def both(stand):
    """What both stores hold; they must be the same."""
    sql, dynamo = await stand.in_postgres(), await stand.in_dynamodb()
    oracle.assert_same(sql, dynamo)
    return sql


async def test_a_thousand_single_and_a_thousand_ndjson_records_are_once_in_both_stores_byte_equal(stand, http):
    """The whole way, in both forms, with a payload that any re-encoding would change."""
    sidecar = await stand.sidecar().start()
    ids: set[str] = set()

    async def singles(start: int) -> None:
        for n in range(start, 1000, 10):
            raw = json.dumps(body(n))[:-1] + f', "request_data": {PAYLOAD}}}'
            ids.add((await post(http, sidecar, raw))["log_id"])

    await asyncio.gather(*(singles(i) for i in range(10)))
    lines = "\n".join(json.dumps(body(n)) for n in range(1000, 2000))
    ids |= set((await post(http, sidecar, lines, kind="application/x-ndjson"))["log_ids"])
    assert len(ids) == 2000
    await sidecar.drained()
    found = await both(stand)
    assert found.keys() == ids
    by_number = {fields["application_id"]: fields for fields in found.values()}
    assert all(by_number[n]["request_data"] == PAYLOAD for n in range(1000))
    assert all(by_number[n]["correlation_id"] == f"c-{n}" for n in range(2000))


async def test_a_connection_over_the_cap_is_told_so_and_the_others_are_served(stand, http):
    """listen.max_connections in the real process on its own event loop: 503 with Retry-After, then room again."""
    sidecar = await stand.sidecar(listen={"max_connections": 3}).start()
    held = [await asyncio.open_connection("127.0.0.1", sidecar.app_port) for _ in range(3)]
    reader, writer = await asyncio.open_connection("127.0.0.1", sidecar.app_port)
    refusal = await asyncio.wait_for(reader.read(), 5)
    assert refusal.startswith(b"HTTP/1.1 503")
    assert b"Retry-After: 1" in refusal
    for _, each in [*held, (reader, writer)]:
        each.close()
        await each.wait_closed()

    async def served() -> bool:
        async with http.post(f"{sidecar.url}/logs", json=body(1)) as answer:
            return answer.status == 202

    await eventually(served)
    assert not [event for event in sidecar.events() if event["level"] == "error"]


async def test_what_clients_send_makes_no_series(stand, http):
    """10,000 services, ids, users, field names, routes and mappings of the clients' choice: the labels stay ours."""
    sidecar = await stand.sidecar(phase="sql_only").start()

    async def storm(name: str) -> set[str]:
        records = [
            {"service_name": f"{name}-{n}", "correlation_id": f"{name}-{n}", "user_id": f"{name}-{n}", "log_type": name}
            for n in range(5_000)
        ]
        await post(http, sidecar, records)
        await post(http, sidecar, [{"service_name": "s", f"{name}-{n}": n} for n in range(100)], status=207)
        for n in range(10):
            for path in (
                f"/{name}-{n}",
                f"/logs/{name}-{n}",
                f"/logs?correlation_id={name}-{n}",
                f"/ingest/{name}-{n}",
            ):
                async with http.get(sidecar.url + path) as answer:
                    await answer.read()
            async with http.post(f"{sidecar.url}/ingest/{name}-{n}", json=[]) as answer:
                assert answer.status == 404
        await sidecar.drained()
        return set(await sidecar.metrics())

    first = await storm("canary-a")
    assert await storm("canary-b") == first
    assert not [sample for sample in first if "canary" in sample]
    assert len(first) < 1_000


async def test_a_record_written_once_is_found_by_correlation_id_in_both_stores(stand, http):
    """The specification's own integration test (L560-596)."""
    sidecar = await stand.sidecar().start()
    correlation = str(uuid.uuid4())
    record = {"log_type": "TEST", "service_name": "TestService", "is_success": True, "correlation_id": correlation}
    answer = await post(http, sidecar, record)
    assert answer["correlation_id"] == correlation
    await sidecar.drained()
    for found in (await stand.in_postgres(), await stand.in_dynamodb()):
        assert [i for i, fields in found.items() if fields["correlation_id"] == correlation] == [answer["log_id"]]


@pytest.mark.parametrize(
    ("phase", "stores"),
    [
        ("sql_only", {"postgres"}),
        ("DualWrite", {"postgres", "dynamodb"}),
        (2, {"postgres", "dynamodb"}),
        ("dynamo_only", {"dynamodb"}),
    ],
)
async def test_each_phase_writes_to_its_stores_and_to_no_other(stand, http, phase, stores):
    """Semantics, section 2, seen in the stores; 201 says that every required one has it."""
    sidecar = await stand.sidecar(phase=phase).start()
    answer = await post(http, sidecar, [body(n) for n in range(50)], status=201, Prefer="wait=10")
    await sidecar.drained()
    ids = set(answer["log_ids"])
    assert (await stand.in_postgres()).keys() == (ids if "postgres" in stores else set())
    assert (await stand.in_dynamodb()).keys() == (ids if "dynamodb" in stores else set())
    one = await sidecar.json(f"/logs/{answer['log_ids'][0]}")
    assert one["log_id"] == answer["log_ids"][0]


async def swap(sidecar, phase: str) -> None:
    """Edit the phase in the mounted ConfigMap and wait until it is applied."""
    sidecar.configure(phase=phase)

    async def applied() -> bool:
        return (await sidecar.json("/status"))["phase"]["applied"] == phase

    await eventually(applied, seconds=5, what=f"{phase} applied")


async def test_a_phase_edited_in_the_mounted_file_takes_effect_and_no_request_fails(stand, http):
    """0 -> 1 -> 2 -> 3 -> 2 -> 1 -> 0 through kubelet's swap, under load; every record where its phase said."""
    sidecar = await stand.sidecar(phase="sql_only").start()
    acked: dict[str, str] = {}
    stop = asyncio.Event()

    async def load() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            answer = await post(http, sidecar, body(n))
            acked[answer["log_id"]] = answer["phase"]

    tasks = [asyncio.create_task(load()) for _ in range(8)]
    for phase in ("dual_write", "dual_write_read_dynamo", "dynamo_only", "dual_write_read_dynamo", "dual_write"):
        await swap(sidecar, phase)
        seen = len(acked)
        await eventually(lambda seen=seen: len(acked) > seen + 20)
    await swap(sidecar, "sql_only")
    stop.set()
    await asyncio.gather(*tasks)
    await sidecar.drained()
    sql, dynamo = await stand.in_postgres(), await stand.in_dynamodb()
    assert set(acked.values()) == {"sql_only", "dual_write", "dual_write_read_dynamo", "dynamo_only"}
    oracle.assert_holds(sql, (i for i, p in acked.items() if p != "dynamo_only"))
    oracle.assert_holds(dynamo, (i for i, p in acked.items() if p != "sql_only"))
    assert sql.keys() | dynamo.keys() == acked.keys()
    assert not sql.keys() & {i for i, p in acked.items() if p == "dynamo_only"}


async def test_a_jump_is_held_with_its_reason_and_garbage_keeps_the_last_good(stand, http):
    """0 -> 3 changes nothing and says why; a broken file changes nothing and raises the gauge."""
    sidecar = await stand.sidecar(phase="sql_only").start()
    sidecar.configure(phase="dynamo_only")

    async def held():
        return (await sidecar.json("/status"))["phase"]["hold"]

    hold = await eventually(held, seconds=5)
    assert hold["gate"] == "adjacent_step"
    assert (await sidecar.json("/status"))["phase"]["applied"] == "sql_only"
    sidecar.mount.write({"config.yaml": "phase: [unclosed"})

    async def refused():
        return (await sidecar.metrics())["sidecar_config_last_reload_successful"] == 0

    await eventually(refused, seconds=5)
    await post(http, sidecar, body(1))


@pytest.mark.parametrize("phase", ["sql_only", "dual_write", "dual_write_read_dynamo", "dynamo_only"])
@pytest.mark.parametrize("first", ["postgres", "dynamodb"])
async def test_an_outage_of_either_store_then_of_the_other_loses_nothing(stand, http, phase, first):
    """Down, accepted, up, the other down, accepted, up: everything owed is there, once."""
    sidecar = await stand.sidecar(phase=phase).start()
    ids: list[str] = []
    for store in (first, "dynamodb" if first == "postgres" else "postgres"):
        if store == "postgres":
            await stand.sql.refuse()
        else:
            stand.dynamo.on("*", Refuse(500, "InternalServerError"))
        for n in range(20):
            ids.append((await post(http, sidecar, body(n)))["log_id"])
        ids += (await post(http, sidecar, [body(n) for n in range(100)]))["log_ids"]
        await stand.sql.normal()
        stand.dynamo.clear()
    await sidecar.drained()
    owed = (await sidecar.json("/status"))["stores"]
    for store, found in (("postgres", await stand.in_postgres()), ("dynamodb", await stand.in_dynamodb())):
        account = owed[store]["account"]
        assert account["owed"] == account["delivered"] == len(found)
        assert found.keys() == (set(ids) if account["owed"] else set())


async def test_a_store_that_is_down_does_not_delay_the_other(stand, http):
    """PostgreSQL in a black hole: DynamoDB has everything while nothing of PostgreSQL's moved."""
    sidecar = await stand.sidecar(phase="dual_write_read_dynamo").start()
    stand.sql.blackhole()
    ids = (await post(http, sidecar, [body(n) for n in range(300)]))["log_ids"]

    async def there():
        return (await stand.in_dynamodb()).keys() == set(ids)

    await eventually(there)
    assert await sidecar.pending() == 300
    answer = await post(http, sidecar, body(1), Prefer="wait=1")
    assert answer["log_id"]
    await stand.sql.normal()
    await sidecar.drained()
    assert len(await both(stand)) == 301


async def test_every_fault_of_dynamodb_that_a_retry_heals_ends_in_equal_stores(stand, http):
    """UnprocessedItems, throttling, 5xx, applied but the reply lost: no record missing, twice, or dead."""
    sidecar = await stand.sidecar().start()
    stand.dynamo.on(
        "BatchWriteItem",
        *(Unprocess(0.4), LoseReply(), Refuse(400, "ProvisionedThroughputExceededException"), None),
        *(Refuse(500, "InternalServerError"), Refuse(400, "ThrottlingException"), Unprocess(0.0), LoseReply()),
        *(Refuse(503, "ServiceUnavailable"), Refuse(400, "RequestLimitExceeded"), Unprocess(0.9)),
    )
    for start in range(0, 1000, 100):
        await post(http, sidecar, [body(n) for n in range(start, start + 100)])
    await sidecar.drained(60)
    assert len(await both(stand)) == 1000
    metrics = await sidecar.metrics()
    assert not any(v for k, v in metrics.items() if k.startswith("sidecar_dead_letter_records"))
    assert metrics['sidecar_store_retries_total{class="throttle",store="dynamodb"}'] > 0


async def test_both_databases_down_at_start_it_serves_acknowledges_and_delivers_when_they_come(stand, http):
    """No store is needed to start, to be ready or to acknowledge."""
    await stand.sql.refuse()
    stand.dynamo.on("*", Refuse(500, "InternalServerError"))
    sidecar = await stand.sidecar().start()
    ids = (await post(http, sidecar, [body(n) for n in range(200)]))["log_ids"]
    assert await sidecar.pending() == 400
    status = await sidecar.json(f"/logs/{ids[0]}/status")
    assert status["stores"] == {"postgres": "pending", "dynamodb": "pending"}
    await stand.sql.normal()
    stand.dynamo.clear()
    await sidecar.drained()
    assert (await both(stand)).keys() == set(ids)


async def test_a_hangup_while_it_starts_does_not_end_it(stand, http):
    """Whoever reloads by SIGHUP does not know how far a start is; a fleet whose stores are silent is waited for."""
    await stand.sql.refuse()
    stand.dynamo.on("*", Hang())
    sidecar = stand.sidecar(fleet={"enabled": True})
    sidecar.spawn()

    async def starting() -> bool:
        async with http.get(f"{sidecar.ops}/livez") as live, http.get(f"{sidecar.ops}/readyz") as ready:
            return (live.status, ready.status) == (200, 503)

    async def listening() -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            return await starting()
        return False

    await eventually(listening)
    sidecar.process.send_signal(signal.SIGHUP)
    await sidecar.ready()
    assert await post(http, sidecar, body(1))
    stand.dynamo.clear()


async def test_one_record_that_a_store_refuses_among_999_is_one_dead_letter_for_that_store(stand, http):
    """A CHECK that one record breaks: 999 in PostgreSQL, 1,000 in DynamoDB, one dead letter without its values."""
    connection = await asyncpg.connect(
        host=stand.postgres.host,
        port=stand.postgres.port,
        user=stand.postgres.user,
        password=stand.postgres.password.reveal(),
        database=stand.postgres.database,
    )
    await connection.execute("ALTER TABLE integration_logs ADD CHECK (processing_time_ms <> 666)")
    await connection.close()
    sidecar = await stand.sidecar().start()
    records = [body(n, processing_time_ms=666 if n == 444 else n % 600) for n in range(1000)]
    records[444]["request_data"] = "SECRET-CANARY-1"
    answer = await post(http, sidecar, records)
    await sidecar.drained()
    bad = answer["log_ids"][444]
    assert (await stand.in_postgres()).keys() == set(answer["log_ids"]) - {bad}
    assert (await stand.in_dynamodb()).keys() == set(answer["log_ids"])
    status = await sidecar.json("/status")
    assert status["spool"]["dead_letters"] == {"postgres/permanent": 1}
    assert (await sidecar.json(f"/logs/{bad}/status"))["stores"]["postgres"] == "dead_lettered"
    assert "SECRET-CANARY-1" not in json.dumps(status) + sidecar.log.read_text()
    sidecar.events()


async def test_a_table_that_is_gone_blocks_that_store_and_makes_no_dead_letter(stand, http):
    """Blocked, alarmed, probed, and delivered without a restart when the table is back."""
    connection = await asyncpg.connect(
        host=stand.postgres.host,
        port=stand.postgres.port,
        user=stand.postgres.user,
        password=stand.postgres.password.reveal(),
        database=stand.postgres.database,
    )
    await connection.execute("ALTER TABLE integration_logs RENAME TO hidden")
    sidecar = await stand.sidecar().start()
    await post(http, sidecar, [body(n) for n in range(100)])

    async def blocked():
        return (await sidecar.metrics())['sidecar_store_state{state="blocked",store="postgres"}'] == 1

    await eventually(blocked)
    assert (await sidecar.json("/status"))["spool"]["dead_letters"] == {}
    await connection.execute("ALTER TABLE hidden RENAME TO integration_logs")
    await connection.close()
    await sidecar.drained()
    assert len(await both(stand)) == 100


async def test_kill_9_under_load_ten_times_loses_and_doubles_nothing(stand, http):
    """Every id that was answered 2xx is once in both stores; nothing is there that was not sent."""
    sidecar = stand.sidecar()
    acked: list[str] = []
    sent: set[str] = set()
    done = asyncio.Event()

    async def load() -> None:
        async with aiohttp.ClientSession() as session:
            while not done.is_set():
                ids = [str(uuid.uuid4()) for _ in range(5)]
                sent.update(ids)
                stamp = "2026-01-01T00:00:00Z"
                batch = [body(1, log_id=i, log_timestamp=stamp) for i in ids]
                try:
                    async with session.post(f"{sidecar.url}/logs", json=batch) as answer:
                        if answer.status == 202:
                            acked.extend((await answer.json())["log_ids"])
                except (aiohttp.ClientError, OSError):
                    await asyncio.sleep(0.01)

    tasks = [asyncio.create_task(load()) for _ in range(4)]
    for _ in range(10):
        await sidecar.start()
        before = len(acked)
        await eventually(lambda before=before: len(acked) >= before + 200)
        sidecar.kill()
    done.set()
    await asyncio.gather(*tasks)
    await sidecar.start()
    await sidecar.drained(60)
    found = await both(stand)
    assert len(set(acked)) == len(acked) >= 2000
    oracle.assert_holds(found, acked)
    assert found.keys() <= sent


async def test_sigterm_with_both_stores_down_exits_in_time_and_the_next_start_delivers(stand, http):
    """Drain gives up at its deadline, counts what is left, and nothing is lost."""
    await stand.sql.refuse()
    stand.dynamo.on("*", Refuse(500, "InternalServerError"))
    sidecar = await stand.sidecar(drain={"timeout": "1s", "stop_accepting_before": "500ms"}).start()
    waiting = asyncio.create_task(post(http, sidecar, body(99), Prefer="wait=30"))
    ids = (await post(http, sidecar, [body(n) for n in range(99)]))["log_ids"]

    async def accepted() -> bool:
        return (await sidecar.pending()) == 200

    await eventually(accepted)
    sidecar.terminate()
    answer = await waiting  # whoever waits is answered before it exits: without an answer it would send again
    assert answer["stores"] == {"postgres": "pending", "dynamodb": "pending"}
    ids.append(answer["log_id"])
    assert await sidecar.exit_code(10) == 0
    assert sidecar.events()[-1]["undelivered_postgres"] == 100
    await sidecar.start()
    assert (await sidecar.metrics())['sidecar_undelivered_at_exit{store="dynamodb"}'] == 100
    await stand.sql.normal()
    stand.dynamo.clear()
    await sidecar.drained()
    assert (await both(stand)).keys() == set(ids)


async def test_sigterm_under_load_keeps_every_acknowledged_record(stand, http):
    """It goes on accepting until shortly before the deadline; what got a 2xx arrives."""
    sidecar = await stand.sidecar(drain={"timeout": "2s", "stop_accepting_before": "1s"}).start()
    acked: list[str] = []

    async def load() -> None:
        try:
            while True:
                async with http.post(f"{sidecar.url}/logs", json=[body(n) for n in range(10)]) as answer:
                    if answer.status == 202:
                        acked.extend((await answer.json())["log_ids"])
                    elif answer.status == 503:
                        assert int(answer.headers["Retry-After"]) > 0
                        return
        except (aiohttp.ClientError, OSError):
            return

    tasks = [asyncio.create_task(load()) for _ in range(4)]
    await eventually(lambda: len(acked) > 200)
    sidecar.terminate()
    at_signal = len(acked)
    await eventually(lambda: len(acked) > at_signal)
    assert await sidecar.exit_code(15) == 0
    await asyncio.gather(*tasks)
    await sidecar.start()
    await sidecar.drained()
    oracle.assert_holds(await both(stand), acked)


async def test_a_resend_has_no_second_effect_also_after_a_restart(stand, http):
    """Same id and content: ``duplicate``; other content: 409; the first wins in both stores."""
    sidecar = await stand.sidecar().start()
    record = body(1, log_id=str(uuid.uuid4()), log_timestamp="2026-01-01T00:00:00.1234567+02:00")
    assert (await post(http, sidecar, record))["duplicate"] is False
    assert (await post(http, sidecar, record))["duplicate"] is True
    sidecar.kill()
    await sidecar.start()
    packed = gzip.compress(json.dumps(record).encode())
    assert (await post(http, sidecar, packed, **{"Content-Encoding": "gzip"}))["duplicate"] is True
    refusal = await post(http, sidecar, {**record, "status_code": 500}, status=409)
    assert "log_id" in json.dumps(refusal)
    await sidecar.drained()
    (found,) = (await both(stand)).values()
    assert (found["status_code"], found["log_timestamp"]) == (200, "2025-12-31T22:00:00.123456Z")


async def test_the_account_adds_up_at_every_scrape_through_outage_poison_and_three_restarts(stand, http):
    """The account: owed = delivered + pending + dead + released + discarded + quarantined, per store, always."""
    connection = await connect(stand.postgres)
    await connection.execute("ALTER TABLE integration_logs ADD CHECK (processing_time_ms <> 666)")
    await connection.close()
    sidecar = await stand.sidecar().start()
    async with watching(sidecar) as scrapes:
        for round_ in range(4):
            await stand.sql.refuse()
            for _ in range(15):
                await post(http, sidecar, [body(n) for n in range(20)])
            await post(http, sidecar, [body(n, processing_time_ms=666 if n == 7 else n) for n in range(20)])
            await stand.sql.normal()
            stand.dynamo.on("BatchWriteItem", Unprocess(0.5), LoseReply(), None)
            for _ in range(15):
                await post(http, sidecar, [body(n) for n in range(20)])
            stand.dynamo.clear()
            if round_ < 3:
                sidecar.kill()
                await sidecar.start()
        await sidecar.drained()
        assert adds_up(await sidecar.metrics()) == 2
    assert scrapes.seen > 20
    metrics = await sidecar.metrics()
    assert metrics['sidecar_dead_letter_records{reason="permanent",store="postgres"}'] == 4
    sql, dynamo = await stand.in_postgres(), await stand.in_dynamodb()
    assert len(dynamo) == 4 * 620
    assert len(sql) == 4 * 619
    oracle.assert_same(sql, {log_id: dynamo[log_id] for log_id in sql})
