"""F1, F2: the process ends without a word, at a random moment or at a chosen system call."""

import asyncio

import pytest

from tests.faults.client import Client
from tests.faults.process import launch, start
from tests.faults.verdict import guilty, judge


async def kill_rounds(row, stand, rounds: int, without: str = "") -> None:
    """Kill while ingesting and draining, start again on the same files; at the end everything is judged."""
    sidecar = stand.sidecar(spool={"checkpoint_bytes": 262_144}, phase="dual_write_read_dynamo")
    async with Client(row, sidecar.url) as client:
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
