"""An independent reader of both stores: drivers only, none of the product's code, everything and not a sample."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import aioboto3
import asyncpg

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


def content(fields: Mapping[str, Any]) -> str:
    """A hash of all thirteen fields, null told from empty."""
    canonical = json.dumps([fields.get(c) for c in COLUMNS], ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


async def read_postgres(settings: Any) -> dict[str, dict[str, Any]]:
    """Every row: id -> fields. Raises AssertionError where an id stands twice."""
    password = settings.password.reveal() if settings.password else None
    connection = await asyncpg.connect(
        host=settings.host,
        port=settings.port,
        user=settings.user,
        password=password,
        database=settings.database,
        ssl=False,
    )
    try:
        rows = await connection.fetch(f'SELECT * FROM "{settings.schema}"."{settings.table}"')
    finally:
        await connection.close(timeout=5)
    counts = Counter(str(r["log_id"]) for r in rows)
    assert max(counts.values(), default=1) == 1, "an id stands twice in PostgreSQL"
    found = {}
    for row in rows:
        fields = dict(row)
        fields["log_id"] = str(fields["log_id"])
        # Not strftime, whose %Y writes the year 1 without its zeros.
        stamp = fields["log_timestamp"].isoformat(timespec="microseconds")
        fields["log_timestamp"] = stamp.replace("+00:00", "Z")
        found[fields["log_id"]] = fields
    return found


async def read_dynamodb(settings: Any, endpoint: str) -> dict[str, dict[str, Any]]:
    """Every item: id -> fields; an absent attribute is null."""
    session = aioboto3.Session(
        aws_access_key_id="test", aws_secret_access_key="test", region_name=settings.region or "us-east-1"
    )
    found: dict[str, dict[str, Any]] = {}
    async with session.client("dynamodb", endpoint_url=endpoint) as client:
        async for page in client.get_paginator("scan").paginate(TableName=settings.table, ConsistentRead=True):
            for item in page["Items"]:
                fields = {name: _plain(item.get(name)) for name in COLUMNS}
                assert fields["log_id"] not in found, "an id stands twice in DynamoDB"
                found[fields["log_id"]] = fields
    return found


def _plain(value: Mapping[str, Any] | None) -> Any:
    if value is None:
        return None
    ((kind, inner),) = value.items()
    return int(inner) if kind == "N" else None if kind == "NULL" else inner


def assert_same(left: Mapping[str, dict[str, Any]], right: Mapping[str, dict[str, Any]]) -> None:
    """The two stores hold the same ids with the same thirteen fields."""
    assert left.keys() == right.keys(), (
        f"{len(left.keys() - right.keys())} only left, {len(right.keys() - left.keys())}"
    )
    differing = [i for i in left if content(left[i]) != content(right[i])]
    assert not differing, (left[differing[0]], right[differing[0]])


def assert_holds(found: Mapping[str, dict[str, Any]], ids: Iterable[str]) -> None:
    """Every acknowledged id is there."""
    missing = set(ids) - found.keys()
    assert not missing, f"{len(missing)} acknowledged records missing, e.g. {sorted(missing)[:3]}"
