"""kill -9 of a real writer at random moments: what was acknowledged reaches both stores."""

import asyncio
import random
import sys

from tests.spool.harness import STORES, balanced, deliver, spool_at

ROUNDS = 6


async def test_no_acknowledged_record_is_lost_over_kill_9(tmp_path):
    """Six rounds on the same files; then every acked id was handed out to each store, and nothing was invented."""
    moments = random.Random(7)
    for _ in range(ROUNDS):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.spool.writer", str(tmp_path), stdout=asyncio.subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            assert await asyncio.wait_for(process.stdout.readline(), 30) == b"ready\n"
            await asyncio.sleep(moments.uniform(0.05, 0.4))
            assert process.returncode is None, "the writer ended by itself"
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
    acked = set((tmp_path / "acked").read_text().splitlines())
    assert len(acked) > 100
    async with spool_at(tmp_path / "spool") as spool:
        assert spool.recovery.unclean
        assert spool.recovery.messages == ()
        for store in STORES:
            got = (tmp_path / store).read_text().splitlines()
            got += [r.log_id for r in await deliver(spool, store)]
            assert acked <= set(got), "an acknowledged record is lost"
            assert balanced(spool.counters(store))
            assert spool.counters(store).quarantined == 0
