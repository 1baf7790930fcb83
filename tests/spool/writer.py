"""A process that appends and delivers for ever and writes each acknowledged id to an fsynced file: to be killed."""

import asyncio
import os
import sys
from pathlib import Path

from tests.spool.harness import BOTH, open_spool, put, records, settings


async def _deliver(spool, store: str, out: int) -> None:
    cursor = spool.cursor(store)
    while True:
        for frame in await cursor.take(50, 1 << 20):
            os.write(out, "".join(f"{r.log_id}\n" for r in frame.records).encode())
            cursor.settle(frame)
            await asyncio.sleep(0.002)


async def _append(spool, acks: int) -> None:
    while True:
        batch = records(5, size=400)
        await put(spool, batch, BOTH)
        os.write(acks, "".join(f"{r.log_id}\n" for r in batch).encode())
        os.fsync(acks)


async def main(root: Path) -> None:
    """Open ``root/spool`` and go on until killed."""

    def out(name: str) -> int:
        return os.open(root / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    spool = open_spool(root / "spool", settings=settings(checkpoint_bytes=256 * 1024, tail_cache_bytes=20_000))
    assert spool.recovery.messages == (), spool.recovery
    print("ready", flush=True)
    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(_append(spool, out("acked")))
        tasks.create_task(_deliver(spool, "postgres", out("postgres")))
        tasks.create_task(_deliver(spool, "dynamodb", out("dynamodb")))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
