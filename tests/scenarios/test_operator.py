"""The operator's night: dead letters over restarts, redrive, export, orders, drains; real processes, real stores."""

import asyncio
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import asyncpg
import pytest

from sidecar import __main__ as cli
from tests.parts import oracle
from tests.parts.fault_proxy import Refuse, Reset
from tests.parts.nursery import NURSERY
from tests.parts.sidecar import ROOT, eventually
from tests.scenarios.test_write_path import both, post

TOKEN = "0perator-t0ken"
SECRET = "payload-canary-5ecret"


def controlled(stand, name="one", **changes):
    """A sidecar with a control token, in a phase that requires both stores."""
    token = stand.base / "token"
    token.write_text(TOKEN)
    return stand.sidecar(name, **{"phase": "dual_write_read_dynamo", "control": {"token_file": str(token)}, **changes})


async def command(sidecar, *words, code=0):
    """Give a command as an operator does; its stdout. The exit code must be as said.

    ``drain`` is a process of its own, as it has signals to mind; the others run in a thread here, which is faster.
    """
    words = [*words, "--config", str(sidecar.mount.directory / "config.yaml")]
    run = _as_process if words[0] == "drain" else _here
    returned, out, err = await asyncio.to_thread(run, words)
    assert returned == code, out + err
    return out


def _here(words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(words)
        except SystemExit as error:  # how argparse ends a usage error
            code = error.code
    return code, out.getvalue(), err.getvalue()


def _as_process(words):
    environ = {**os.environ, "AWS_EC2_METADATA_DISABLED": "true"}
    done = NURSERY.run(["sidecar", *words], environ)
    return done.returncode, done.stdout, done.stderr


async def lines(sidecar, *words):
    """The same, as NDJSON."""
    return [json.loads(line) for line in (await command(sidecar, *words)).splitlines()]


async def sql(stand, statement):
    """As the database's owner."""
    options = stand.postgres
    connection = await asyncpg.connect(
        host=options.host,
        port=options.port,
        user=options.user,
        password=options.password.reveal() if options.password else None,
        database=options.database,
        ssl=False,
    )
    try:
        await connection.execute(statement)
    finally:
        await connection.close(timeout=5)


async def forbid(stand, service):
    """PostgreSQL refuses this service as data (23514)."""
    check = f"CHECK (service_name <> '{service}') NOT VALID"
    await sql(stand, f'ALTER TABLE integration_logs ADD CONSTRAINT "no_{service}" {check}')


async def allow(stand, service):
    """And takes it again."""
    await sql(stand, f'ALTER TABLE integration_logs DROP CONSTRAINT "no_{service}"')


async def account(sidecar, store="postgres"):
    """Its durable account; the identity must hold."""
    found = (await sidecar.json("/status"))["stores"][store]["account"]
    parts = ("delivered", "pending", "dead_lettered", "released", "discarded", "quarantined")
    assert found["owed"] == sum(found[part] for part in parts)
    return found


async def poisoned(stand, http, sidecar, *services, good=30):
    """Good records and one of each of these services, which PostgreSQL refuses; service -> log_id."""
    for service in services:
        await forbid(stand, service)
    records = [{"service_name": f"good-{n}", "request_data": SECRET} for n in range(good)]
    records += [{"service_name": service, "request_data": SECRET} for service in services]
    answer = await post(http, sidecar, records)
    await sidecar.drained()
    assert (await account(sidecar))["dead_lettered"] == len(services)
    return dict(zip(services, answer["log_ids"][good:], strict=True))


async def test_dead_letters_are_the_same_after_three_restarts(stand, http):
    """Killed, stopped in order, killed: byte for byte the same export, and the same account."""
    sidecar = await controlled(stand).start()
    await poisoned(stand, http, sidecar, "bad1", "bad2")
    before = await command(sidecar, "dead-letter", "export")
    assert len(before.splitlines()) == 2
    owed = await account(sidecar)
    for graceful in (False, True, False):
        if graceful:
            sidecar.terminate()
            assert await sidecar.exit_code() == 0
        else:
            sidecar.kill()
        assert await command(sidecar, "dead-letter", "export") == before, "from the files, while it is stopped"
        await sidecar.start()
        assert await command(sidecar, "dead-letter", "export") == before, "through the control API"
        assert await account(sidecar) == owed


async def test_redrive_by_id_by_reason_and_all_delivers_and_removes(stand, http):
    """Each takes what it names; what is delivered is no dead letter any more, and both stores are equal at the end."""
    sidecar = await controlled(stand).start()
    ids = await poisoned(stand, http, sidecar, "bad1", "bad2", "bad3")
    for service in ids:
        await allow(stand, service)
    await command(sidecar, "dead-letter", "redrive", "--id", ids["bad1"])
    await sidecar.drained()
    assert {d["log_id"] for d in await lines(sidecar, "dead-letter", "ls", "--json")} == {ids["bad2"], ids["bad3"]}
    assert "0 dead letters" in await command(sidecar, "dead-letter", "redrive", "--reason", "conflict")
    assert "2 dead letters" in await command(sidecar, "dead-letter", "redrive", "--reason", "permanent")
    await sidecar.drained()
    found = await both(stand)
    assert len(found) == 33
    await forbid(stand, "bad4")
    await post(http, sidecar, {"service_name": "bad4"})
    await sidecar.drained()
    await allow(stand, "bad4")
    assert "1 dead letters" in await command(sidecar, "dead-letter", "redrive", "--all", "--why", "mended")
    await sidecar.drained()
    assert (await account(sidecar))["dead_lettered"] == 0
    assert len(await both(stand)) == 34


async def test_a_redriven_record_that_fails_again_keeps_its_first_time_and_counts_its_attempts(stand, http):
    """The first error's time stays, the attempts grow, the neighbours are not touched."""
    sidecar = await controlled(stand).start()
    ids = await poisoned(stand, http, sidecar, "bad1")
    (first,) = await lines(sidecar, "dead-letter", "ls", "--json")
    await command(sidecar, "dead-letter", "redrive", "--id", ids["bad1"])

    async def again():
        found = await lines(sidecar, "dead-letter", "ls", "--json")
        return found if found and found[0]["attempts"] > first["attempts"] else None

    (second,) = await eventually(again, what="dead again")
    assert second["attempts"] == first["attempts"] + 1
    for name in ("key", "log_id", "store", "class", "reason", "code", "first_at", "phase"):
        assert second[name] == first[name], name
    assert second["last_at"] > first["last_at"]
    assert (await account(sidecar))["delivered"] == 30


async def test_a_discard_is_audited_and_the_identity_holds(stand, http):
    """Who, why and how many; the record is in the other store alone, and it shows as divergence."""
    sidecar = await controlled(stand).start()
    ids = await poisoned(stand, http, sidecar, "bad1")
    await command(sidecar, "dead-letter", "discard", "--id", ids["bad1"], code=2)
    await command(sidecar, "dead-letter", "discard", "--id", ids["bad1"], "--why", "a test record")
    found = await account(sidecar)
    assert (found["dead_lettered"], found["discarded"]) == (0, 1)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with http.get(f"{sidecar.url}/api/control/audit", headers=headers) as answer:
        trail = (await answer.json())["audit"]
    (line,) = [line for line in trail if line["what"] == "discard"]
    assert line["why"] == "a test record"
    assert "as " in line["who"]
    assert (await stand.in_dynamodb()).keys() - (await stand.in_postgres()).keys() == {ids["bad1"]}
    metrics = await sidecar.metrics()
    key = 'sidecar_divergence_records{missing_from="postgres",present_in="dynamodb"}'
    assert metrics[key] == 1


async def test_exported_dead_letters_posted_elsewhere_make_the_stores_equal(stand, http):
    """The way round: export, discard, and post the records to another sidecar, once PostgreSQL takes them."""
    sidecar = await controlled(stand).start()
    ids = await poisoned(stand, http, sidecar, "bad1", "bad2")
    exported = await lines(sidecar, "dead-letter", "export")
    await command(sidecar, "dead-letter", "discard", "--all", "--why", "posted again elsewhere")
    for service in ids:
        await allow(stand, service)
    other = await controlled(stand, "two").start()
    await post(http, other, [line["record"] for line in exported])
    await other.drained()
    assert len(await both(stand)) == 32


async def test_a_paused_store_waits_the_other_does_not_and_the_order_outlives_a_kill(stand, http):
    """Status says who, why and since when; after kill -9 it is paused still; resume delivers everything."""
    sidecar = await controlled(stand).start()
    await command(sidecar, "store", "pause", "dynamodb", "--why", "table is being moved")
    await post(http, sidecar, [{"service_name": "s"} for _ in range(200)])

    async def one_sided() -> bool:
        return (await account(sidecar, "postgres"))["delivered"] == 200

    await eventually(one_sided, what="delivered to PostgreSQL")
    for restart in (False, True):
        if restart:
            sidecar.kill()
            await sidecar.start()
        status = await sidecar.json("/status")
        order = status["orders"]["dynamodb"]["paused"]
        assert order["reason"] == "table is being moved"
        assert order["by"].startswith("token token from 127.0.0.1 as ")
        assert order["since"].endswith("Z")
        assert status["stores"]["dynamodb"]["state"] == "paused"
        assert (await account(sidecar, "dynamodb"))["pending"] == 200
        assert stand.dynamo.items["BatchWriteItem"] == 0
    await command(sidecar, "store", "resume", "dynamodb", "--why", "moved")
    await sidecar.drained()
    assert len(await both(stand)) == 200


async def test_a_rate_bounds_what_a_store_is_given(stand, http):
    """At 100 records a second 150 are not all there when as many as fast would be; wait sees them through."""
    sidecar = await controlled(stand).start()
    await command(sidecar, "store", "rate", "dynamodb", "100", "--why", "gently")
    assert (await sidecar.json("/status"))["stores"]["dynamodb"]["rate_limit"] == 100
    await post(http, sidecar, [{"service_name": "s"} for _ in range(150)])

    async def other_done() -> bool:
        return (await account(sidecar, "postgres"))["pending"] == 0

    await eventually(other_done, what="PostgreSQL is done")
    assert (await account(sidecar, "dynamodb"))["pending"] > 50
    await command(sidecar, "wait", "--timeout", "30")
    assert len(await both(stand)) == 150


async def test_wait_ends_with_1_when_the_time_is_up_and_0_when_nothing_is_pending(stand, http):
    """With a store down it says how many are left; afterwards it waits them through."""
    sidecar = await controlled(stand).start()
    await stand.sql.refuse()
    await post(http, sidecar, [{"service_name": "s"} for _ in range(5)])
    await command(sidecar, "wait", "--timeout", "0.5", code=1)
    await stand.sql.normal()
    await command(sidecar, "wait", "--timeout", "30")
    assert len(await both(stand)) == 5


async def test_sigterm_with_both_stores_down_ends_in_time_and_a_drain_delivers_everything(stand, http):
    """Exit 0 within the deadline, the rest counted; then the directory, copied elsewhere, is emptied into both."""
    sidecar = await controlled(stand, drain={"timeout": "2s", "stop_accepting_before": "500ms"}).start()
    await stand.sql.refuse()
    stand.dynamo.on("*", Reset())
    answer = await post(http, sidecar, [{"service_name": "s", "request_data": SECRET} for _ in range(500)])
    sidecar.terminate()
    assert await sidecar.exit_code(10) == 0
    assert sidecar.events()[-1]["undelivered_postgres"] == 500
    copied = stand.base / "elsewhere"
    shutil.copytree(sidecar.spool, copied)
    shutil.rmtree(sidecar.spool)
    await command(sidecar, "drain", "--spool", str(copied), "--timeout", "0.5", code=1)
    await stand.sql.normal()
    stand.dynamo.clear()
    said = await command(sidecar, "drain", "--spool", str(copied))
    assert said == ""
    assert (await both(stand)).keys() == set(answer["log_ids"])
    await command(sidecar, "drain", "--spool", str(copied))
    assert await lines(sidecar, "spool", "export", "--spool", str(copied)) == []


async def test_what_a_fenced_instance_accepted_is_counted_wherever_what_is_left_is_counted(stand, http):
    """Owed to be decided is not delivered: wait says so, /status and metrics, the last line and the next start."""
    await stand.sql.refuse()
    stand.dynamo.on("*", Reset())
    fleet = {"enabled": True, "heartbeat": "200ms", "fence_after": "2s"}
    brief = {"timeout": "1s", "stop_accepting_before": "500ms"}
    sidecar = await controlled(stand, fleet=fleet, drain=brief).start()  # reaches no store, so it starts fenced
    headers = {"Prefer": "wait=0"}
    async with http.post(f"{sidecar.url}/logs", json={"service_name": "s"}, headers=headers) as answer:
        assert answer.status == 202
        assert (await answer.json())["stores"] == {"dynamodb": "undecided", "postgres": "undecided"}
    await command(sidecar, "wait", "--timeout", "0.5", code=1)
    assert (await sidecar.json("/status"))["spool"]["undecided_records"] == 1
    assert (await sidecar.metrics())["sidecar_spool_undecided_records"] == 1
    sidecar.terminate()
    assert await sidecar.exit_code(10) == 0
    assert sidecar.events()[-1]["undelivered_undecided"] == 1
    await sidecar.start()
    assert (await sidecar.metrics())['sidecar_undelivered_at_exit{store="undecided"}'] == 1
    await stand.sql.normal()
    stand.dynamo.clear()
    await command(sidecar, "wait", "--timeout", "30")
    assert len(await both(stand)) == 1


async def test_a_drain_after_a_kill_delivers_what_was_stamped_and_says_what_it_cannot(stand, http):
    """Obligations count, not the configuration's phase; a dead letter is left, named, and the exit code is 1."""
    sidecar = await controlled(stand, phase="dual_write").start()
    await poisoned(stand, http, sidecar, "bad1")
    await stand.sql.refuse()
    answer = await post(http, sidecar, [{"service_name": "s"} for _ in range(50)])
    sidecar.kill()
    await stand.sql.normal()
    sidecar.configure(phase="sql_only")
    await command(sidecar, "drain", "--spool", str(sidecar.spool), code=1)
    sql_has, dynamo_has = await stand.in_postgres(), await stand.in_dynamodb()
    oracle.assert_holds(sql_has, answer["log_ids"])
    oracle.assert_holds(dynamo_has, answer["log_ids"])
    assert len(dynamo_has.keys() - sql_has.keys()) == 1
    await allow(stand, "bad1")
    await command(sidecar, "dead-letter", "redrive", "--all")
    await command(sidecar, "drain", "--spool", str(sidecar.spool))
    await both(stand)


async def test_a_drain_is_stopped_by_sigterm_with_everything_still_there(stand, http):
    """Exit 1, and the next drain goes on."""
    sidecar = await controlled(stand).start()
    await stand.sql.refuse()
    await post(http, sidecar, [{"service_name": "s"} for _ in range(20)])
    sidecar.kill()
    config = str(sidecar.mount.directory / "config.yaml")
    words = [sys.executable, "-m", "sidecar", "drain", "--spool", str(sidecar.spool), "--config", config]
    process = await asyncio.create_subprocess_exec(*words, cwd=ROOT, stderr=asyncio.subprocess.PIPE)
    try:
        stderr = process.stderr
        assert stderr is not None
        async with asyncio.timeout(20):
            while b"pending" not in (line := await stderr.readline()) and b"delivered" not in line:
                assert line, "it ended before it had begun"
        process.send_signal(signal.SIGTERM)
        rest = await asyncio.wait_for(stderr.read(), 20)
        assert await process.wait() == 1
        assert b"20 pending" in rest
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    await stand.sql.normal()
    await command(sidecar, "drain", "--spool", str(sidecar.spool))
    assert len(await both(stand)) == 20


async def test_commands_against_a_running_sidecar_show_the_token_their_way_in(stand, http):
    """Without a token file control is off (exit 2); a wrong token is 2; the right one by --token-file is 0."""
    token = stand.base / "other"
    token.write_text(TOKEN)
    closed = await stand.sidecar("closed").start()
    await command(closed, "dead-letter", "ls", code=2)
    sidecar = await controlled(stand).start()
    token.write_text("wrong")
    await command(sidecar, "spool", "ls", "--token-file", str(token), code=2)
    token.write_text(TOKEN)
    await command(sidecar, "spool", "ls", "--token-file", str(token), "--url", sidecar.url)
    await command(sidecar, "spool", "ls", "--spool", str(sidecar.spool), code=3)
    sidecar.terminate()
    await sidecar.exit_code()
    await command(sidecar, "spool", "ls", "--url", sidecar.url, code=5)
    await command(sidecar, "spool", "ls")


async def test_what_waits_can_be_listed_exported_and_checked_while_it_runs(stand, http):
    """ls, cat, export and verify through the control API, on records that only wait for one store."""
    sidecar = await controlled(stand).start()
    stand.dynamo.on("BatchWriteItem", Refuse(500, "InternalServerError"))
    answer = await post(http, sidecar, [{"service_name": "s", "request_data": SECRET} for _ in range(40)])

    async def one_sided() -> bool:
        return (await account(sidecar, "postgres"))["delivered"] == 40

    await eventually(one_sided, what="delivered to PostgreSQL")
    listed = await lines(sidecar, "spool", "ls", "--json")
    assert [line["pending"] for line in listed if "seq" in line] == [["dynamodb"]]
    exported = await lines(sidecar, "spool", "export")
    assert {line["record"]["log_id"] for line in exported} == set(answer["log_ids"])
    (one,) = await lines(sidecar, "spool", "cat", answer["log_ids"][7])
    assert one["stores"] == {"dynamodb": "pending", "postgres": "delivered"}
    await command(sidecar, "spool", "cat", str(uuid.uuid4()), code=1)
    (verdict,) = await lines(sidecar, "spool", "verify")
    assert (verdict["records"], verdict["problems"]) == (40, [])
    stand.dynamo.clear()
    await sidecar.drained()
    await both(stand)


async def test_a_planted_secret_is_in_no_listing_status_metric_or_log(stand, http):
    """Payload and token: ls of both kinds, /status, /metrics, /healthz and the log know neither."""
    sidecar = await controlled(stand, drain={"timeout": "1s", "stop_accepting_before": "200ms"}).start()
    await poisoned(stand, http, sidecar, "bad1")
    await stand.sql.refuse()
    await post(http, sidecar, [{"service_name": "s", "request_data": SECRET, "error_message": SECRET}])
    shown = [
        await command(sidecar, "spool", "ls"),
        await command(sidecar, "spool", "ls", "--json"),
        await command(sidecar, "dead-letter", "ls"),
        await command(sidecar, "dead-letter", "ls", "--json"),
        json.dumps(await sidecar.json("/status")),
        json.dumps(await sidecar.json("/healthz", ops=True)),
        json.dumps(await sidecar.metrics()),
    ]
    async with http.get(f"{sidecar.url}/api/control/audit", headers={"Authorization": "Bearer wrong"}) as answer:
        shown.append(await answer.text())
    sidecar.terminate()
    await sidecar.exit_code()
    shown += [
        sidecar.log.read_text(),
        await command(sidecar, "spool", "ls"),
        await command(sidecar, "dead-letter", "ls"),
    ]
    for text in shown:
        assert SECRET not in text
        assert TOKEN not in text


@pytest.mark.timeout(60)
def test_the_demo_proves_its_own_counts():
    """The whole walk, quickly: exit 0, the proof on the last line, every step shown, no colour codes."""
    done = subprocess.run(
        [sys.executable, "-m", "sidecar", "demo", "--fast"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("once, and nothing else is.")
    assert "\x1b" not in done.stdout
    for what in ("Phase 0", "Phase 1", "throttles", "Phase 2", "kill -9", "check_violation", "Phase 3", "missing 0"):
        assert what in done.stdout, what


@pytest.mark.timeout(60)
async def test_ctrl_c_ends_the_demo_and_all_that_it_started(tmp_path):
    """Exit 130; no process of it lives on, and its directory is gone."""
    environ = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    for made in (tmp_path, *tmp_path.parents):
        if made == Path(tempfile.gettempdir()):
            break
        made.chmod(0o755)  # as root PostgreSQL runs as nobody
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sidecar", "demo"),
        cwd=ROOT,
        env=environ,
        stdout=asyncio.subprocess.PIPE,
        # A run in the background of a shell inherits SIGINT as ignored; a terminal's child does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        stdout = process.stdout
        assert stdout is not None
        async with asyncio.timeout(30):
            while b"Phase 0" not in (line := await stdout.readline()):
                assert line, "it ended before it had begun"
        started = _children(str(tmp_path))
        assert len(started) >= 2
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(stdout.read(), 30)
        assert await process.wait() == 130
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    await eventually(lambda: not _children(str(tmp_path)), what="all have ended")
    assert list(tmp_path.glob("sidecar-demo-*")) == []


def _children(mark: str) -> list[int]:
    """Processes whose command line names this directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found
