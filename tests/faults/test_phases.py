"""F16 to F19: poisoned records, phase changes with a store down, kills during them, garbage as configuration."""

import asyncio
import itertools
import os

import yaml

from tests.faults.client import Client
from tests.faults.process import ended, start
from tests.faults.test_stores import heal, refuse
from tests.faults.verdict import dead_letters, guilty, judge, require
from tests.parts.postgres import connect
from tests.parts.sidecar import eventually

PHASES = ("sql_only", "dual_write", "dual_write_read_dynamo", "dynamo_only")
POISON = 666


async def poisoned(row, stand, without: str = "") -> None:
    """Batches in which one record breaks a CHECK of the table: it alone is a dead letter, of PostgreSQL alone."""
    admin = await connect(stand.postgres)
    await admin.execute(f"ALTER TABLE integration_logs ADD CHECK (processing_time_ms <> {POISON})")
    await admin.close()
    sidecar = await start(stand.sidecar(phase="dual_write_read_dynamo"), without=without)
    bad: set[str] = set()
    client = Client(row, sidecar.url)
    async with client.session() as session:
        for position in (0, 499, 999):
            records = client.records(1000, processing_time_ms=1)
            records[position]["processing_time_ms"] = POISON
            bad.add(records[position]["log_id"])
            assert await client.send(session, records) == 202
    await sidecar.drained(60)
    if without:
        await judge(client.history, stand, dead={"postgres": bad})
    await judge(client.history, stand, sidecar, dead={"postgres": bad})
    client.history.close()
    sidecar.terminate()
    assert await ended(sidecar) == 0
    require("lost", dead_letters(sidecar.spool)["postgres"] ^ bad, "the dead letters on disk are not the poisoned ones")


async def test_f16_a_poisoned_record_is_dead_alone_wherever_it_stands(begin, stand):
    """F16: first, in the middle, last of a thousand: its neighbours are delivered, the other store has it too."""
    await poisoned(begin("F16"), stand)


async def test_f16_control_a_batch_dropped_whole_is_found_guilty(begin, stand):
    """The control: no bisection."""
    with guilty("lost"):
        await poisoned(begin("F16"), stand, "drops_poisoned_batches")


async def phase(sidecar, name: str) -> None:
    """Ask for a phase through the mounted file and wait until it is applied, gates overridden."""
    sidecar.configure(phase=name, phase_force="fault matrix")

    async def applied() -> bool:
        return (await sidecar.json("/status"))["phase"]["applied"] == name

    await eventually(applied, seconds=30, what=f"{name} applied")


async def changes_while_down(row, stand, rounds: int, without: str = "") -> None:
    """A store goes down in one phase, the phase changes and is rolled back, the store comes back."""
    pairs = list(itertools.permutations(PHASES, 2))
    row.rng.shuffle(pairs)
    plan = [(*pairs[n % len(pairs)], row.rng.choice(("postgres", "dynamodb"))) for n in range(rounds)]
    if without:  # what must cost records whatever is drawn: a store that the later phase does not write
        plan = [("sql_only", "dynamo_only", "postgres"), ("dynamo_only", "sql_only", "dynamodb")]
    sidecar = stand.sidecar(phase=plan[0][0], retry={"delay": "10ms", "max_delay": "50ms"}, reload={"poll": "50ms"})
    async with Client(row, sidecar.url, workers=2, pause=0.02) as client:
        await start(sidecar, without=without)
        for before, after, store in plan:
            row.note("phase change with a store down", before=before, after=after, store=store)
            await phase(sidecar, before)
            await refuse(stand, store)
            await client.acked(20)
            await phase(sidecar, after)
            await client.acked(20)
            if row.rng.random() < 0.5:
                await phase(sidecar, before)
                await client.acked(20)
            await heal(stand)
        await client.stop()
        await sidecar.drained(60)
        await judge(client.history, stand, sidecar)


async def test_f17_what_is_owed_survives_phase_changes_with_a_store_down(begin, stand):
    """F17: every record is where the phase of its answer demanded, and nowhere else."""
    row = begin("F17")
    await changes_while_down(row, stand, row.rounds)


async def test_f17_control_obligations_asked_of_the_phase_of_now_are_found_guilty(begin, stand):
    """The control: what is owed is recomputed at delivery."""
    with guilty("lost"):
        await changes_while_down(begin("F17"), stand, 6, "forgets_what_it_owes")


async def kills_during_changes(row, stand, rounds: int, without: str = "") -> None:
    """Each round the phase moves by one step, and the process is killed somewhere around it."""
    sidecar = stand.sidecar(phase="sql_only", phase_force="fault matrix", reload={"poll": "50ms"})
    at = 0
    async with Client(row, sidecar.url, workers=2) as client:
        await start(sidecar, without=without)
        for _ in range(rounds):
            await client.acked(20)
            at = row.rng.choice([step for step in (at - 1, at + 1) if 0 <= step < len(PHASES)])  # always a change
            row.note("kill at a phase change", to=PHASES[at])
            lines = sidecar.log.read_text().count('"phase changed"')
            sidecar.configure(phase=PHASES[at])
            if row.rng.random() < 0.5:
                await eventually(
                    lambda n=lines, p=PHASES[at]: (
                        sidecar.log.read_text().count('"phase changed"') > n or f'"to": "{p}"' in sidecar.tail()
                    ),
                    every=0.001,
                    what="the phase change",
                )
            else:
                await asyncio.sleep(row.rng.uniform(0, 0.15))
            sidecar.kill()
            await start(sidecar, without=without)
        await client.acked(20)
        if without:
            sidecar.kill()
            await start(sidecar)
        await client.stop()
        await sidecar.drained(60)
        await judge(client.history, stand, sidecar)
        await phase(sidecar, PHASES[at])


async def test_f18_a_kill_during_a_phase_change_leaves_the_phase_before_or_after(begin, stand):
    """F18: each record is where the phase that its answer named demanded; the change is finished at the next start."""
    row = begin("F18")
    await kills_during_changes(row, stand, row.rounds)


async def test_f18_control_an_answer_before_the_commit_is_found_guilty(begin, stand):
    """The control: the phase of an answer without a commit is worth nothing."""
    with guilty("lost"):
        await kills_during_changes(begin("F18"), stand, 3, "ack_before_commit")


def bomb() -> bytes:
    """Aliases of aliases."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 8)]
    return "\n".join(lines).encode()


def garbage(rng, good: dict) -> list[tuple[str, object]]:
    """Files that are no configuration: bytes, or a way to break the mount."""
    text = yaml.safe_dump(good).encode()
    wrong: list[tuple[str, object]] = [
        ("empty", b""),
        ("blank", b"  \n\n"),
        ("a list", b"- phase\n- sql_only\n"),
        ("a word", b"sql_only"),
        ("not closed", b"phase: [unclosed"),
        ("NUL", b"phase: sql_only\x00"),
        ("tabs", b"phase:\n\t- x"),
        ("not UTF-8", b"phase: \xff\xfe"),
        ("UTF-16", "phase: sql_only\n".encode("utf-16")),
        ("10 MB", b"# " + b"x" * 10_000_000),
        ("bomb", bomb()),
        ("a tag", b"phase: !!python/object/apply:os.system ['true']"),
        ("two documents", b"phase: sql_only\n---\nphase: dynamo_only\n"),
        ("a key twice", b"phase: sql_only\nphase: dynamo_only\n"),
        ("deep", b"{a: " * 500 + b"1" + b"}" * 500),
        ("vanished", "vanish"),
        ("half a swap", "dangling"),
        ("a directory", "directory"),
        ("not to be read", "fifo"),
    ]
    for name, value in (
        ("phase", "SQL"),
        ("phase", 7),
        ("phase", None),
        ("phase", ["sql_only"]),
        ("phase_epoch", -1),
        ("fail_closed_after", "soon"),
        ("retry", {"delay": "-1s"}),
        ("retry", {"attempts": 0}),
        ("ingest", {"max_depth": "deep"}),
        ("ingest", {"max_record_bytes": "1GiB"}),
        ("flags", {"writes_to_sql": False}),
        ("postgres", {"table": 'x"; DROP TABLE y'}),
        ("typo", 1),
    ):
        wrong.append((f"{name}={value!r}", yaml.safe_dump({**good, name: value}).encode()))
    stated = text.index(b"\nphase:")
    while len(wrong) < 40:
        cut = rng.randrange(stated)  # before the phase, or in the middle of it
        wrong.append((f"cut at {cut}", text[:cut]))
    return wrong


async def garbage_rounds(row, stand, without: str = "") -> None:
    """Each piece of garbage in the mounted file; the last good configuration stays in force."""
    sidecar = stand.sidecar(phase="dual_write", reload={"poll": "50ms"})
    good = dict(sidecar.settings)
    cases = garbage(row.rng, good)
    path = sidecar.mount.directory / "config.yaml"
    client = Client(row, sidecar.url)
    await start(sidecar, without=without)
    async with client.session() as session:
        for name, content in cases if not without else cases[:2]:
            row.note("garbage", name=name)
            before = (await sidecar.metrics())["sidecar_config_reload_failures_total"]
            if isinstance(content, bytes):
                sidecar.mount.write({"config.yaml": content})
            else:
                path.unlink()
                if content == "dangling":
                    path.symlink_to("..data_tmp/config.yaml")
                elif content == "directory":
                    path.mkdir()
                elif content == "fifo":
                    os.mkfifo(path)

            async def noticed(before=before, name=name) -> bool:
                metrics = await sidecar.metrics()
                state = (await sidecar.json("/status"))["phase"]["desired"]
                require("garbage", state != "dual_write" and state, f"{name} became a wish")
                return (
                    metrics["sidecar_config_reload_failures_total"] > before
                    and not metrics["sidecar_config_last_reload_successful"]
                )

            await eventually(noticed, seconds=10, what=f"{name} refused")
            assert await client.send(session, client.records(1)) == 202
            if not isinstance(content, bytes):
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
                path.symlink_to("..data/config.yaml")
            sidecar.configure()

            async def back() -> bool:
                return bool((await sidecar.metrics())["sidecar_config_last_reload_successful"])

            await eventually(back, seconds=10, what=f"good again after {name}")
    await sidecar.drained()
    await judge(client.history, stand, sidecar)
    require("garbage", {*client.history.acked.values()} - {"dual_write"}, "another phase was in force")
    client.history.close()


async def test_f19_garbage_as_configuration_changes_nothing_and_is_told(begin, stand):
    """F19: 40 files: gauge down, counter up, the phase and the service as before; a good file heals each."""
    await garbage_rounds(begin("F19"), stand)


async def test_f19_control_garbage_that_means_defaults_is_found_guilty(begin, stand):
    """The control: what cannot be read is replaced by defaults."""
    with guilty("garbage"):
        await garbage_rounds(begin("F19"), stand, "garbage_means_defaults")
