"""An adopted table is a source as any other: rows without an id have computed ones, the same at every run."""

import random

import asyncpg

from sidecar.backfill.job import Job, Shard
from sidecar.phase import DYNAMODB, POSTGRES
from sidecar.stores.postgres import PostgresStore
from tests.backfill.test_run import Stand, all_of
from tests.parts.adopted import old_rows
from tests.stores.records import BASE


async def test_old_rows_are_copied_under_their_computed_ids_and_a_second_run_puts_none(
    specified_store: PostgresStore, application: asyncpg.Connection
) -> None:
    """Two shards, one of them stopped on the way: every row once; then nothing is left to put."""
    old = await old_rows(application, BASE, 3_000)
    jobs = [Job(POSTGRES, DYNAMODB, shard=Shard(index, 2)) for index in range(2)]
    stand = Stand(jobs[0], random.Random(1))
    stand.source = specified_store  # type: ignore[assignment]  # a store as any other
    for job in jobs:
        await stand.run(job, stop_after=500)
        assert (await stand.run(job)).good
    assert {r.log_id: r for r in await all_of(stand.destination)} == {r.log_id: r for r in old}
    before = len(stand.destination.filled)
    for job in jobs:
        seen = await stand.run(job)
        assert (seen.good, seen.copied, seen.missing) == (True, 0, 0)
    assert len(stand.destination.filled) == before
