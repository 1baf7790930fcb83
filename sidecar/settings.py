"""Every setting: its name, unit, default and meaning. Frozen once parsed; ``sidecar.config`` reads and checks them.

The section names are the keys of config.yaml. ``Seconds`` are written as a number or with a unit (``1s``, ``15m``,
``24h``, ``100ms``), ``Bytes`` as a number or with a unit (``256KiB``, ``1GiB``). ``LIVE`` names what a hot reload may
change; any other change is reported as ``restart_required`` and never half-applied (semantics, section 8).
"""

from typing import Annotated, Final, Literal

import msgspec

from sidecar.phase import Phase

Seconds = Annotated[float, msgspec.Meta(ge=0, title="seconds")]
Bytes = Annotated[int, msgspec.Meta(ge=0, title="bytes")]
Count = Annotated[int, msgspec.Meta(ge=0)]

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB


class Secret:
    """A text that shows itself to nobody: ``repr`` and ``str`` are ``***``."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The text itself, for the one call that needs it."""
        return self._value

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A section of config.yaml."""


class Listen(_Section, frozen=True):
    """Where the sidecar listens."""

    app: str = "127.0.0.1:8080"  # host:port, or unix:/path for a unix socket
    ops: str = "0.0.0.0:9464"  # metrics and health only: no control, no payload
    max_connections: Annotated[int, msgspec.Meta(ge=1)] = 256
    header_timeout: Seconds = 10.0
    body_timeout: Seconds = 30.0
    idle_timeout: Seconds = 75.0
    hosts: tuple[str, ...] = ()  # Host names accepted besides localhost, 127.0.0.1 and [::1]


class Ingest(_Section, frozen=True):
    """Bounds at the door."""

    max_body_bytes: Bytes = 10 * MIB  # after decompression
    max_records: Annotated[int, msgspec.Meta(ge=1)] = 10_000  # per request
    max_record_bytes: Annotated[int, msgspec.Meta(ge=1024, le=350 * KIB, title="bytes")] = 256 * KIB
    max_depth: Annotated[int, msgspec.Meta(ge=4, le=500)] = 64
    max_future: Seconds = 24 * 3600.0  # a log_timestamp further ahead is refused
    max_wait: Seconds = 30.0  # upper bound of `Prefer: wait=`
    ack: Literal["durable", "stores"] = "durable"  # stores = every request waits as with Prefer: wait=max_wait


class Dedup(_Section, frozen=True):
    """The window in which a resend is recognised here, before it reaches a store."""

    max_ids: Count = 100_000
    window: Seconds = 600.0


class Spool(_Section, frozen=True):
    """The durable buffer on local disk."""

    directory: str = "/var/lib/sidecar/spool"
    cap_bytes: Annotated[int, msgspec.Meta(ge=16 * MIB, title="bytes")] = GIB
    ballast_bytes: Bytes = 32 * MIB  # unlinked on a full disk so that drains go on
    high_watermark: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.9  # of the cap: push back above
    low_watermark: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.8  # accept again below
    tail_cache_bytes: Bytes = 8 * MIB
    checkpoint_bytes: Annotated[int, msgspec.Meta(ge=256 * KIB, title="bytes")] = 2 * MIB
    dead_letter_share: Annotated[float, msgspec.Meta(gt=0, le=0.5)] = 0.1  # of the cap, per store
    refused_share: Annotated[float, msgspec.Meta(ge=0, le=0.5)] = 0.02  # of the cap, for records refused at the door
    allow_volatile: bool = False  # accept tmpfs, overlay or NFS as the spool's file system


class Retry(_Section, frozen=True):
    """How delivery tries again (specification L386-387)."""

    attempts: Annotated[int, msgspec.Meta(ge=1, le=100)] = 3  # for answers of unknown meaning only
    delay: Seconds = 1.0  # base of the full-jitter back-off
    max_delay: Seconds = 30.0  # its cap
    probe_interval: Seconds = 30.0  # of a blocked store
    fk_grace: Seconds = 900.0  # how long a missing parent row (23503) may still appear


class Postgres(_Section, frozen=True):
    """The PostgreSQL store."""

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 5432
    database: str = "postgres"
    user: str = "postgres"
    password: Secret | None = None
    password_file: str | None = None  # re-read at each connect: IAM tokens live 15 minutes
    schema: str = "public"
    table: str = "integration_logs"
    sslmode: Literal["disable", "require", "verify-ca", "verify-full"] | None = None  # None: verify-full off loopback
    sslrootcert: str | None = None
    connect_timeout: Seconds = 5.0
    command_timeout: Seconds = 30.0
    idle_close: Seconds = 60.0
    write_connections: Annotated[int, msgspec.Meta(ge=1, le=2)] = 2
    read_connections: Annotated[int, msgspec.Meta(ge=1, le=2)] = 2
    pgbouncer: bool = False  # transaction pooling: no prepared statements that outlive a transaction
    batch_records: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1_000
    batch_bytes: Annotated[int, msgspec.Meta(ge=350 * KIB, title="bytes")] = 4 * MIB


class DynamoDB(_Section, frozen=True):
    """The DynamoDB store. Credentials come from the standard AWS chain (IRSA, Pod Identity, environment)."""

    table: str = "integration_logs"
    fleet_table: str = "integration_logs_fleet"
    region: str | None = None  # None: AWS_REGION / AWS_DEFAULT_REGION
    endpoint_url: str | None = None
    shards: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4  # per day, for the service and errors indexes
    max_in_flight: Annotated[int, msgspec.Meta(ge=1, le=128)] = 16
    read_in_flight: Annotated[int, msgspec.Meta(ge=1, le=64)] = 8
    connect_timeout: Seconds = 2.0
    read_timeout: Seconds = 10.0
    ttl_days: Annotated[int, msgspec.Meta(ge=1)] | None = None  # counted from log_timestamp, never from write time


class Phases(_Section, frozen=True):
    """Which phase is wanted, and how it may change."""

    max_lag: Seconds = 60.0
    min_soak: Seconds = 24 * 3600.0
    min_quiet: Seconds = 3600.0
    min_shadow_reads: Count = 0


class Control(_Section, frozen=True):
    """Who may change anything."""

    token_file: str | None = None  # None: mutations are off, not open


class Reads(_Section, frozen=True):
    """Who may read, and how much at once."""

    token_file: str | None = None
    services: tuple[str, ...] | None = None  # allow-list; None: all
    max_limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1_000
    max_days: Annotated[int, msgspec.Meta(ge=1, le=366)] = 31  # widest time range of one query
    count_max_days: Annotated[int, msgspec.Meta(ge=1, le=3660)] = 31
    timeout: Seconds = 10.0
    shadow_sample: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.01  # share of reads repeated on the other store
    shadow_probe: Seconds = 60.0  # a read of its own where applications only write; 0 = off


class Drain(_Section, frozen=True):
    """What SIGTERM does."""

    timeout: Seconds = 25.0
    stop_accepting_before: Seconds = 5.0  # of the deadline: an application may still write its last lines


class Fleet(_Section, frozen=True):
    """How instances move together."""

    enabled: bool = False
    heartbeat: Seconds = 10.0
    fence_after: Seconds = 120.0


class Reload(_Section, frozen=True):
    """How a changed configuration file is noticed."""

    poll: Annotated[float, msgspec.Meta(gt=0, le=60, title="seconds")] = 1.0  # how often the file is looked at


class Logging(_Section, frozen=True):
    """The sidecar's own log: JSON, one line each, never a payload."""

    level: Literal["debug", "info", "warning", "error"] = "info"


class Assertions(_Section, frozen=True):
    """The specification's flags (L371-382). They assert: a contradiction with the phase's row is refused."""

    writes_to_sql: bool | None = None
    writes_to_dynamodb: bool | None = None
    require_both_writes: bool | None = None
    reads_from_dynamodb: bool | None = None


class Settings(_Section, frozen=True):
    """The whole configuration, frozen."""

    phase: Phase = Phase.SQL_ONLY
    phase_epoch: Count | None = None
    phase_force: str | None = None
    continue_on_write_failure: bool = True  # False: an owed store down for fail_closed_after makes ingest answer 503
    fail_closed_after: Seconds = 60.0
    instance: str | None = None  # None: HOSTNAME
    flags: Assertions = Assertions()
    listen: Listen = Listen()
    ingest: Ingest = Ingest()
    dedup: Dedup = Dedup()
    spool: Spool = Spool()
    retry: Retry = Retry()
    postgres: Postgres = Postgres()
    dynamodb: DynamoDB = DynamoDB()
    phases: Phases = Phases()
    control: Control = Control()
    reads: Reads = Reads()
    drain: Drain = Drain()
    fleet: Fleet = Fleet()
    reload: Reload = Reload()
    logging: Logging = Logging()


LIVE: Final = frozenset(
    {
        "phase",
        "phase_epoch",
        "phase_force",
        "continue_on_write_failure",
        "fail_closed_after",
        "flags",
        "ingest",
        "retry",
        "phases",
        "reads",
        "drain",
        "logging",
    }
)
"""Top-level keys that a hot reload applies; the rest need a restart."""
