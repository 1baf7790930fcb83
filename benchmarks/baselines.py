"""What a team writes without this product: the same endpoint, both stores written before the answer.

``naive``
    For each record: await one INSERT, then await one PutItem.
``careful``
    For each POST: one ``executemany`` in one transaction and one ``batch_writer`` (25 items a call), side by side.

Both are ordinary aiohttp + asyncpg + aioboto3, pooled and warmed, uvloop on, with the same thirteen columns,
indexes and item attributes as the sidecar writes. Neither keeps anything on disk of its own, so a crash or an outage
loses what the client does not send again: they do less than the sidecar, not more.
"""

import argparse
import asyncio
import contextlib
import json
import os
import time
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import aioboto3
import asyncpg
import uvloop
from aiohttp import web
from botocore.config import Config

COLUMNS = (
    "log_id",
    "application_id",
    "log_type",
    "service_name",
    "request_data",
    "response_data",
    "status_code",
    "is_success",
    "error_message",
    "processing_time_ms",
    "log_timestamp",
    "correlation_id",
    "user_id",
)
# The sidecar's own table, index by index, so that the server has the same work.
DDL = """
CREATE TABLE IF NOT EXISTS integration_logs (
    log_id uuid PRIMARY KEY, application_id bigint, log_type varchar(50) NOT NULL DEFAULT 'INFO',
    service_name varchar(100) COLLATE "C" NOT NULL, request_data text, response_data text, status_code integer,
    is_success boolean NOT NULL DEFAULT true, error_message text, processing_time_ms bigint,
    log_timestamp timestamptz NOT NULL DEFAULT now(), correlation_id varchar(100) COLLATE "C",
    user_id varchar(100) COLLATE "C");
CREATE INDEX IF NOT EXISTS il_application ON integration_logs (application_id, log_timestamp DESC, log_id DESC)
    WHERE application_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS il_service ON integration_logs (service_name, log_timestamp DESC, log_id DESC);
CREATE INDEX IF NOT EXISTS il_correlation ON integration_logs (correlation_id, log_timestamp DESC, log_id DESC)
    WHERE correlation_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS il_failures ON integration_logs (log_timestamp DESC, log_id DESC) WHERE NOT is_success;
CREATE INDEX IF NOT EXISTS il_time ON integration_logs (log_timestamp, log_id);
"""
INSERT = (
    f"INSERT INTO integration_logs ({', '.join(COLUMNS)}) "
    f"VALUES ({', '.join(f'${n}' for n in range(1, len(COLUMNS) + 1))}) ON CONFLICT (log_id) DO NOTHING"
)
POOL = web.AppKey("pool", asyncpg.Pool)
TABLE: web.AppKey[Any] = web.AppKey("table")
Row = tuple[Any, ...]
Item = dict[str, Any]


def uuid7() -> uuid.UUID:
    """Time-ordered, as the sidecar mints them, so that the B-trees see the same load."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10))
    return uuid.UUID(int=value & ~(0xF << 76) & ~(0x3 << 62) | 0x7 << 76 | 0x2 << 62)


def text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def prepare(document: dict[str, Any]) -> tuple[Row, Item]:
    """One record as a row and as an item of the same layout as the sidecar's."""
    log_id = uuid.UUID(document["log_id"]) if "log_id" in document else uuid7()
    at = datetime.now(UTC)
    values = document | {
        "log_id": log_id,
        "log_timestamp": at,
        "request_data": text(document.get("request_data")),
        "response_data": text(document.get("response_data")),
    }
    row = tuple(values.get(name) for name in COLUMNS)
    item = {name: value for name, value in values.items() if value is not None}
    stamp = f"{at:%Y-%m-%dT%H:%M:%S.%f}Z#{log_id}"
    item |= {"log_id": str(log_id), "log_timestamp": f"{at:%Y-%m-%dT%H:%M:%S.%f}Z"}
    item |= {"gs": f"S#{values['service_name']}#{at:%Y-%m-%d}#{log_id.int % 4}", "gt": stamp}
    if values.get("application_id") is not None:
        item["ga"] = f"A#{values['application_id']}"
    if values.get("correlation_id") is not None:
        item["gc"] = f"C#{values['correlation_id']}"
    if not values["is_success"]:
        item["ge"] = f"E#{at:%Y-%m-%d}#{log_id.int % 4}"
    return row, item


async def documents(request: web.Request) -> list[dict[str, Any]]:
    body = await request.read()
    if request.content_type == "application/x-ndjson":
        return [json.loads(line) for line in body.splitlines() if line]
    parsed = json.loads(body)
    return parsed if isinstance(parsed, list) else [parsed]


def accepted(items: list[Item]) -> web.Response:
    return web.json_response({"log_ids": [item["log_id"] for item in items]}, status=201)


async def naive(request: web.Request) -> web.Response:
    items = []
    for document in await documents(request):
        row, item = prepare(document)
        async with request.app[POOL].acquire() as connection:
            await connection.execute(INSERT, *row)
        await request.app[TABLE].put_item(Item=item)
        items.append(item)
    return accepted(items)


async def careful(request: web.Request) -> web.Response:
    prepared = [prepare(document) for document in await documents(request)]
    items = [item for _, item in prepared]

    async def to_postgres() -> None:
        async with request.app[POOL].acquire() as connection:
            await connection.executemany(INSERT, [row for row, _ in prepared])

    async def to_dynamodb() -> None:
        async with request.app[TABLE].batch_writer() as writer:
            for item in items:
                await writer.put_item(Item=item)

    await asyncio.gather(to_postgres(), to_dynamodb())
    return accepted(items)


def application(dsn: str, endpoint: str, table: str) -> web.Application:
    async def stores(app: web.Application) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            pool = await stack.enter_async_context(asyncpg.create_pool(dsn, min_size=10, max_size=10))
            await pool.execute(DDL)
            app[POOL] = pool
            resource = await stack.enter_async_context(
                aioboto3.Session().resource(
                    "dynamodb",
                    endpoint_url=endpoint,
                    region_name="us-east-1",
                    config=Config(max_pool_connections=64),
                )
            )
            app[TABLE] = await resource.Table(table)
            yield

    app = web.Application(client_max_size=32 * 2**20)
    app.cleanup_ctx.append(stores)
    app.router.add_post("/naive", naive)
    app.router.add_post("/careful", careful)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="the two naive baselines, at /naive and /careful")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--dynamodb", required=True, help="endpoint URL")
    parser.add_argument("--table", default="integration_logs")
    given = parser.parse_args()
    uvloop.install()
    web.run_app(
        application(given.dsn, given.dynamodb, given.table),
        host="127.0.0.1",
        port=given.port,
        access_log=None,
        print=None,
    )


if __name__ == "__main__":
    main()
