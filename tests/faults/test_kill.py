"""F1, F2: the process ends without a word, at a random moment or at a chosen system call."""

import asyncio

import pytest

from tests.faults.client import Client
from tests.faults.process import injected, start
from tests.faults.verdict import guilty, judge
from tests.parts.sidecar import eventually


async def kill_rounds(row, stand, rounds: int, without: str = "") -> None:
    """Kill while ingesting and draining, start again on the same files; at the end everything is judged."""
    sidecar = stand.sidecar(spool={"checkpoint_bytes": 262_144}, phase="dual_write_read_dynamo")
    async with Client(row, sidecar.url, pause=0.01) as client:
        for n in range(rounds):
            await start(sidecar, without=without)
            await client.acked(20)
            await asyncio.sleep(row.rng.uniform(0, 0.2))
            row.note("kill -9", n=n)
            sidecar.kill()
        await client.stop()
        await start(sidecar)
        await sidecar.drained(60)
        await judge(client.history, stand, sidecar)


async def test_f1_kill_9_at_random_loses_nothing(begin, stand):
    """F1: whatever the moment, acknowledged records reach both stores once, others both or none."""
    row = begin("F1")
    await kill_rounds(row, stand, row.rounds)


async def test_f1_control_an_answer_before_the_commit_is_found_guilty(begin, stand):
    """The control: with answers ahead of the commit, the same test finds losses."""
    row = begin("F1")
    with guilty("lost"):
        await kill_rounds(row, stand, 3, "ack_before_commit")


CALLS = {"pwrite64": 60, "fdatasync": 25, "ftruncate": 2, "unlink": 2, "fallocate": 1, "link": 1}
"""System calls of the spool's files, and how many of them a short life has."""


async def point_rounds(row, stand, points: int, without: str = "") -> None:
    """Kill at the N-th call of one kind on the spool's files, whatever it is in the middle of; then judge."""
    sidecar = stand.sidecar(spool={"checkpoint_bytes": 262_144}, phase="dual_write_read_dynamo")
    files = [sidecar.spool / name for name in ("spool.db", "spool.db-wal", "spool.db-wal.kept", "position", "ballast")]
    hit = 0
    async with Client(row, sidecar.url, size=4_000, pause=0.01) as client:
        for _ in range(points):
            call = row.rng.choices(list(CALLS), weights=[8, 5, 1, 1, 1, 1])[0]
            rule = f"{call}:signal=KILL:when={row.rng.randint(1, CALLS[call])}"
            row.note("kill at a call", rule=rule)
            trace = stand.base / "trace"
            async with injected(sidecar, files, rule, trace=trace, without=without) as ready:
                before = len(client.history.acked)

                def over(before=before) -> bool:
                    return len(client.history.acked) > before + 400 or sidecar.process.poll() is not None

                if ready:
                    await eventually(over, what=rule)
                hit += sidecar.process.poll() is not None
            assert sidecar.process.poll() == -9
        await client.stop()
        await start(sidecar)
        await sidecar.drained(60)
        assert without or hit >= points // 2, f"only {hit} of {points} kills hit their call"
        await judge(client.history, stand, sidecar)


@pytest.mark.root
async def test_f2_a_kill_at_a_chosen_system_call_loses_nothing(begin, stand):
    """F2: between any two calls that commit, checkpoint, truncate or delete."""
    row = begin("F2")
    await point_rounds(row, stand, row.rounds)


@pytest.mark.root
async def test_f2_control_an_answer_before_the_commit_is_found_guilty(begin, stand):
    """The control: killed at a call of the commit, records that were answered before it are gone."""
    row = begin("F2")
    with guilty("lost"):
        await point_rounds(row, stand, 4, "ack_before_commit")
