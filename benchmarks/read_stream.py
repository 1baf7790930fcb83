"""A stream over a million rows of PostgreSQL, page by page through the sidecar: is its memory flat, how fast is it?

::

    .venv/bin/python -m benchmarks.read_stream [--rows 1000000] [--limit 1000]

Prints resident memory of the sidecar every tenth of the way, rows per second, CPU per million rows, and exits 1 where
rows were missed or met twice, or where memory grew by more than ``--allow`` MiB after the first tenth.
"""

import argparse
import asyncio
import re
import time

import aiohttp
import asyncpg

from benchmarks.processes import Cores
from benchmarks.read_rig import read_rig

FILL = """
INSERT INTO integration_logs (log_id, service_name, application_id, log_timestamp, request_data, correlation_id)
SELECT gen_random_uuid(), 'orders', 7, timestamptz '2026-01-15' + (i / 3) * interval '1 microsecond',
       repeat('x', 300), 'c' FROM generate_series($1::int, $2::int) i
"""
LOG_ID = re.compile(rb'"log_id":"([0-9a-f-]{36})"')
CURSOR = re.compile(rb'"next_cursor":(?:"([^"]+)"|null)')


async def run(rows: int, limit: int, allow: float) -> int:
    async with read_rig() as rig:
        where = rig.postgres.settings()
        assert where.password is not None
        connection = await asyncpg.connect(
            host=where.host, port=where.port, user=where.user, password=where.password.reveal(), ssl=False
        )
        started = time.monotonic()
        for start in range(1, rows + 1, 100_000):
            await connection.execute(FILL, start, min(rows, start + 99_999))
        await connection.execute("ANALYZE integration_logs")
        await connection.close()
        print(f"filled {rows} rows in {time.monotonic() - started:.0f} s")
        rig.document["phase"] = "sql_only"
        rig.configure(shadow_sample=0.0)
        await rig.start(Cores.of_this_machine().under_test)
        assert rig.child is not None
        base = f"http://127.0.0.1:{rig.port}/logs?application_id=7&limit={limit}"
        seen: set[bytes] = set()
        met, received, url, warm, mark = 0, 0, base, 0.0, rows // 10
        cpu, started = rig.child.cpu_seconds(), time.monotonic()
        async with aiohttp.ClientSession() as session:
            while True:
                async with session.get(url) as answer:
                    body = await answer.read()
                    if answer.status != 200:
                        raise SystemExit(f"{answer.status}: {body[:500]!r}")
                ids = LOG_ID.findall(body)
                met, received = met + len(ids), received + len(body)
                seen.update(ids)
                if met >= mark:
                    memory = rig.child.memory()
                    warm = warm or memory["rss_mib"]
                    print(f"{met:>9} rows  {received / 2**20:7.0f} MiB sent  {memory['rss_mib']:6.1f} MiB resident")
                    mark += rows // 10
                found = CURSOR.search(body)
                if found is None or found[1] is None:
                    break
                url = f"{base}&cursor={found[1].decode()}"
        seconds, memory = time.monotonic() - started, rig.child.memory()
        cpu = rig.child.cpu_seconds() - cpu
        grown = memory["rss_mib"] - warm
        print(
            f"{met} rows ({len(seen)} distinct) in {seconds:.1f} s: {met / seconds:.0f} rows/s, "
            f"{cpu / met * 1e6:.1f} CPU s per million; resident grew {grown:+.1f} MiB after the first tenth, "
            f"peak {memory['peak_mib']:.1f} MiB"
        )
        return 0 if met == len(seen) == rows and grown <= allow else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--limit", type=int, default=1_000)
    parser.add_argument("--allow", type=float, default=16.0, help="MiB")
    chosen = parser.parse_args()
    raise SystemExit(asyncio.run(run(chosen.rows, chosen.limit, chosen.allow)))
