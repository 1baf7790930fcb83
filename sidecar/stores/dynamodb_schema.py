"""The table, its four indexes and the fleet table: what they must be, how they are made, how they are checked.

``EXPECTED`` is the one description; ``create`` makes what is missing of it and ``check`` compares with it. A table
with another key is reported, not repaired; nothing is ever deleted here but by ``drop``, which has a guard of its own
(``sidecar.backfill.clearing``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from botocore.exceptions import ClientError

from sidecar import settings
from sidecar.clock import Clock
from sidecar.errors import RetryClass, StoreError
from sidecar.phase import DYNAMODB
from sidecar.stores.base import Check
from sidecar.stores.dynamodb_wire import Wire

SORT: Final = "gt"
TTL: Final = "expires_at"
PROJECTION: Final = ("h", "is_success", "log_type", "processing_time_ms", "status_code")
POLL_SECONDS: Final = 1.0
CREATE_SECONDS: Final = 1800.0  # filling a new index of a large table takes long; run again if it takes longer


@dataclass(frozen=True, slots=True)
class Index:
    """One global secondary index: its name and its hash key; sort key and projection are the same for all."""

    name: str
    hash_key: str


SERVICE: Final = Index("service", "gs")
APPLICATION: Final = Index("application", "ga")
CORRELATION: Final = Index("correlation", "gc")
ERRORS: Final = Index("errors", "ge")
INDEXES: Final = (SERVICE, APPLICATION, CORRELATION, ERRORS)
FLEET_KEY: Final = (("pk", "HASH"), ("sk", "RANGE"))


def _definition(index: Index) -> dict[str, Any]:
    return {
        "IndexName": index.name,
        "KeySchema": [
            {"AttributeName": index.hash_key, "KeyType": "HASH"},
            {"AttributeName": SORT, "KeyType": "RANGE"},
        ],
        "Projection": {"ProjectionType": "INCLUDE", "NonKeyAttributes": list(PROJECTION)},
    }


def _known(table: Any) -> set[str]:
    return {definition["AttributeName"] for definition in table["AttributeDefinitions"]}


def _attributes(*names: str) -> list[dict[str, str]]:
    return [{"AttributeName": name, "AttributeType": "S"} for name in names]


async def create(wire: Wire, options: settings.DynamoDB, *, clock: Clock) -> Sequence[str]:
    """Create what is missing and wait until all of it is ACTIVE; returns what was done. Raises StoreError."""
    done: list[str] = []
    async with wire.control() as client:
        table = await _describe(client, options.table)
        if table is None:
            await client.create_table(
                TableName=options.table,
                BillingMode="PAY_PER_REQUEST",
                KeySchema=[{"AttributeName": "log_id", "KeyType": "HASH"}],
                AttributeDefinitions=_attributes("log_id", SORT, *(index.hash_key for index in INDEXES)),
                GlobalSecondaryIndexes=[_definition(index) for index in INDEXES],
                DeletionProtectionEnabled=True,
            )
            done.append(f"table {options.table} with indexes {', '.join(index.name for index in INDEXES)}")
        if await _describe(client, options.fleet_table) is None:
            await client.create_table(
                TableName=options.fleet_table,
                BillingMode="PAY_PER_REQUEST",
                KeySchema=[{"AttributeName": name, "KeyType": kind} for name, kind in FLEET_KEY],
                AttributeDefinitions=_attributes(*(name for name, _ in FLEET_KEY)),
            )
            done.append(f"table {options.fleet_table}")
        table = await _until_active(client, options.table, clock)
        await _until_active(client, options.fleet_table, clock)
        present = {index["IndexName"] for index in table.get("GlobalSecondaryIndexes", ())}
        for index in INDEXES:  # the service takes one new index at a time
            if index.name not in present:
                await client.update_table(
                    TableName=options.table,
                    AttributeDefinitions=_attributes(*_known(table) | {SORT, index.hash_key}),
                    GlobalSecondaryIndexUpdates=[{"Create": _definition(index)}],
                )
                done.append(f"index {index.name}")
                table = await _until_active(client, options.table, clock)
        done.extend(await _features(client, options))
    return done


async def drop(wire: Wire, options: settings.DynamoDB, *, clock: Clock) -> Sequence[str]:
    """Delete the table of records, and wait until it is gone; returns what was done. Raises StoreError.

    The fleet table stays: the shard schedule, gaps and trail are worth more than before.
    """
    async with wire.control() as client:
        if await _describe(client, options.table) is None:
            return ()
        await client.update_table(TableName=options.table, DeletionProtectionEnabled=False)
        await _until_active(client, options.table, clock)
        await client.delete_table(TableName=options.table)
        deadline = clock.monotonic() + CREATE_SECONDS
        while await _describe(client, options.table) is not None:
            if clock.monotonic() >= deadline:
                raise StoreError(DYNAMODB, RetryClass.TRANSIENT, f"table {options.table} is not gone yet", "NotGone")
            await clock.sleep(POLL_SECONDS)
    return (f"table {options.table} deleted",)


async def _features(client: Any, options: settings.DynamoDB) -> list[str]:
    """TTL where it is set, and point-in-time recovery where the service has it (emulators may not)."""
    done: list[str] = []
    if options.ttl_days is not None and await _ttl(client, options.table) != TTL:
        await client.update_time_to_live(
            TableName=options.table, TimeToLiveSpecification={"Enabled": True, "AttributeName": TTL}
        )
        done.append(f"time to live by {TTL}")
    if await _recovery(client, options.table) == "DISABLED":
        try:
            await client.update_continuous_backups(
                TableName=options.table,
                PointInTimeRecoverySpecification={"PointInTimeRecoveryEnabled": True},
            )
            done.append("point-in-time recovery")
        except ClientError:
            # Not without it is this table unusable: emulators have none, a role may not be allowed to; check() tells.
            done.append("point-in-time recovery could NOT be enabled")
    return done


async def check(wire: Wire, options: settings.DynamoDB) -> Sequence[Check]:
    """Compare with the description above. Raises StoreError.

    Lines named ``warning: ...`` are always ok: they show what is there and what is advised.
    """
    found: list[Check] = []
    async with wire.control() as client:
        table = await _describe(client, options.table)
        fleet = await _describe(client, options.fleet_table)
        found.append(_table_check(options.table, table, (("log_id", "HASH"),)))
        found.append(_table_check(options.fleet_table, fleet, FLEET_KEY))
        indexes = {} if table is None else {i["IndexName"]: i for i in table.get("GlobalSecondaryIndexes", ())}
        found.extend(_index_check(index, indexes.get(index.name)) for index in INDEXES)
        if table is not None:
            if options.ttl_days is not None:
                ttl = await _ttl(client, options.table)
                found.append(Check("time to live", ttl == TTL, ttl or "off", f"by {TTL}"))
            recovery = await _recovery(client, options.table)
            found.append(Check("warning: point-in-time recovery", True, recovery, "ENABLED is advised"))
            protected = str(bool(table.get("DeletionProtectionEnabled"))).lower()
            found.append(Check("warning: deletion protection", True, protected, "true is advised"))
    return found


def _table_check(name: str, table: Any, key: tuple[tuple[str, str], ...]) -> Check:
    required = f"ACTIVE, key {_key_text(key)} of type S"
    if table is None:
        return Check(f"table {name}", False, "missing", required)
    seen = _key_of(table)
    types = {a["AttributeName"]: a["AttributeType"] for a in table["AttributeDefinitions"]}
    kinds = ",".join(types.get(attribute, "?") for attribute, _ in seen)
    ok = table["TableStatus"] in _USABLE and seen == key and set(kinds.split(",")) == {"S"}
    return Check(f"table {name}", ok, f"{table['TableStatus']}, key {_key_text(seen)} of type {kinds}", required)


def _index_check(index: Index, seen: Any) -> Check:
    key = ((index.hash_key, "HASH"), (SORT, "RANGE"))
    required = f"ACTIVE, key {_key_text(key)}, projecting at least {', '.join(PROJECTION)}"
    if seen is None:
        return Check(f"index {index.name}", False, "missing", required)
    projection = seen["Projection"]
    names = sorted(projection.get("NonKeyAttributes", ()))
    everything = projection["ProjectionType"] == "ALL"
    # Emulators leave the status out of a description.
    status = seen.get("IndexStatus", "ACTIVE")
    ok = status == "ACTIVE" and _key_of(seen) == key and (everything or set(PROJECTION) <= set(names))
    shown = "everything" if everything else ", ".join(names) or "keys only"
    return Check(f"index {index.name}", ok, f"{status}, key {_key_text(_key_of(seen))}, projecting {shown}", required)


_USABLE: Final = frozenset({"ACTIVE", "UPDATING"})  # a table takes reads and writes while an index is being added


def _key_of(description: Any) -> tuple[tuple[str, str], ...]:
    parts = sorted(description["KeySchema"], key=lambda part: part["KeyType"])  # HASH before RANGE
    return tuple((part["AttributeName"], part["KeyType"]) for part in parts)


def _key_text(key: tuple[tuple[str, str], ...]) -> str:
    return " + ".join(f"{name} {kind}" for name, kind in key)


async def _describe(client: Any, name: str) -> Any:
    try:
        return (await client.describe_table(TableName=name))["Table"]
    except ClientError as exc:
        if exc.response["Error"]["Code"] == "ResourceNotFoundException":
            return None
        raise


async def _ttl(client: Any, name: str) -> str | None:
    """The attribute that items expire by; None where they do not."""
    answer = await client.describe_time_to_live(TableName=name)
    seen = answer["TimeToLiveDescription"]
    return str(seen["AttributeName"]) if seen["TimeToLiveStatus"] in {"ENABLED", "ENABLING"} else None


async def _recovery(client: Any, name: str) -> str:
    try:
        answer = await client.describe_continuous_backups(TableName=name)
    except ClientError:
        return "unknown"  # emulators have none, a role may not be allowed to look; it is a warning only
    seen = answer["ContinuousBackupsDescription"].get("PointInTimeRecoveryDescription", {})
    return str(seen.get("PointInTimeRecoveryStatus", "DISABLED"))


async def _until_active(client: Any, name: str, clock: Clock) -> Any:
    """Wait until the table and each of its indexes is ACTIVE; returns its description."""
    deadline = clock.monotonic() + CREATE_SECONDS
    while True:
        table = await _describe(client, name)
        if table is not None and table["TableStatus"] == "ACTIVE":
            states = {index.get("IndexStatus", "ACTIVE") for index in table.get("GlobalSecondaryIndexes", ())}
            if states <= {"ACTIVE"}:
                return table
        if clock.monotonic() >= deadline:
            raise StoreError(
                DYNAMODB, RetryClass.TRANSIENT, f"table {name} is not ACTIVE yet: run this again later", "NotActive"
            )
        await clock.sleep(POLL_SECONDS)
