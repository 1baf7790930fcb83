"""Every setting: its name, unit, default and meaning. Frozen once parsed; ``sidecar.config`` reads and checks them.

The section names are the keys of config.yaml. ``Seconds`` are written as a number or with a unit (``1s``, ``15m``,
``24h``, ``100ms``), ``Bytes`` as a number or with a unit (``256KiB``, ``1GiB``). ``LIVE`` names what a hot reload may
change; any other change is reported as ``restart_required`` and never half-applied (semantics, section 8).
"""

from typing import Annotated, Final, Literal

import msgspec

from sidecar.declared_mapping import Mappings
from sidecar.phase import Phase

Seconds = Annotated[float, msgspec.Meta(ge=0, title="seconds")]
Patience = Annotated[float, msgspec.Meta(gt=0, title="seconds")]  # a wait that must end, and not at once
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
    max_connections: Annotated[int, msgspec.Meta(ge=1)] = 256  # of each listener; one more: 503, at ops an old one goes
    header_timeout: Patience = 10.0  # for the whole request head; slower clients are cut off
    body_timeout: Patience = 30.0  # for the whole body
    idle_timeout: Patience = 75.0  # how long a connection without a request is kept
    hosts: tuple[str, ...] = ()  # Host names accepted besides localhost, 127.0.0.1 and [::1]


class Ingest(_Section, frozen=True):
    """Bounds at the door."""

    max_body_bytes: Bytes = 10 * MIB  # after decompression
    max_records: Annotated[int, msgspec.Meta(ge=1)] = 10_000  # per request
    # stored size of one record; 350 KiB always fits DynamoDB's 400 KB item
    max_record_bytes: Annotated[int, msgspec.Meta(ge=1024, le=350 * KIB, title="bytes")] = 256 * KIB
    max_depth: Annotated[int, msgspec.Meta(ge=4, le=500)] = 64  # nesting of JSON
    # a log_timestamp further ahead is refused; never more than a day, for which readers know the shards of DynamoDB
    max_future: Annotated[float, msgspec.Meta(ge=0, le=86_400, title="seconds")] = 24 * 3600.0
    max_wait: Seconds = 30.0  # upper bound of `Prefer: wait=`
    ack: Literal["durable", "stores"] = "durable"  # stores = every request waits as with Prefer: wait=max_wait


class Dedup(_Section, frozen=True):
    """The window in which a resend is recognised here, before it reaches a store."""

    max_ids: Count = 100_000  # client-supplied or derived ids kept; the oldest go first; 0 = off
    window: Seconds = 600.0  # how long an id is kept


class Spool(_Section, frozen=True):
    """The durable buffer on local disk."""

    directory: str = "/var/lib/sidecar/spool"  # on a disk that survives; mode 0700, one sidecar at a time
    # what all records, dead letters included, may take on disk
    cap_bytes: Annotated[int, msgspec.Meta(ge=16 * MIB, title="bytes")] = GIB
    ballast_bytes: Bytes = 32 * MIB  # unlinked on a full disk so that drains go on
    high_watermark: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.9  # of the cap: push back above
    low_watermark: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.8  # accept again below
    tail_cache_bytes: Bytes = 4 * MIB  # records kept in memory for stores that keep up
    # size of the write-ahead log that starts a checkpoint
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


class AdoptedColumns(_Section, frozen=True):
    """The adopted table's columns, by the record's fields: names as they stand in the catalogue, where case counts."""

    application_id: str = "ApplicationId"  # smallint, integer or bigint
    log_type: str = "LogType"  # text or varchar, not null
    service_name: str = "ServiceName"  # text or varchar, not null
    request_data: str = "RequestData"  # text or varchar; jsonb would not give back what it was given
    response_data: str = "ResponseData"  # as request_data
    status_code: str = "StatusCode"  # smallint, integer or bigint; text or varchar with status_code_text
    is_success: str = "IsSuccess"  # boolean, not null
    error_message: str = "ErrorMessage"  # text or varchar
    processing_time_ms: str = "ProcessingTimeMs"  # smallint, integer or bigint
    log_timestamp: str = "LogTimestamp"  # timestamptz, or timestamp with assume_zone; not null
    correlation_id: str = "CorrelationId"  # text or varchar
    user_id: str = "UserId"  # text or varchar


class Adopted(_Section, frozen=True):
    """A table that others made and write to: `postgres.schema` and `postgres.table` name it, see docs/ADOPTING.md."""

    enabled: bool = False  # true: records go to that table under its own names; the sidecar never creates or alters it
    key: str = "LogId"  # its integer key, numbered by the database; rows of old writers are known by it
    log_id: str = "SidecarLogId"  # the nullable uuid column of the sidecar's rows; `sidecar adopt` adds it
    # the table's number in computed ids; never change it once rows were copied, and give each table its own
    tag: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 1
    assume_zone: str | None = None  # UTC or +hh:mm: what a `timestamp` column without a zone means
    # true: a text status column; whole numbers are read as such, any other text as null
    status_code_text: bool = False
    columns: AdoptedColumns = AdoptedColumns()


class Postgres(_Section, frozen=True):
    """The PostgreSQL store."""

    host: str = "127.0.0.1"  # name, address, or the absolute path of a socket directory
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 5432  # TCP port, or the number in the socket's name
    database: str = "postgres"  # its name
    user: str = "postgres"  # a role with INSERT and SELECT on the table
    password: Secret | None = None  # better: ${VAR} or password_file
    password_file: str | None = None  # re-read at each connect: IAM tokens live 15 minutes
    schema: str = "public"  # of the table
    table: str = "integration_logs"  # where records go
    sslmode: Literal["disable", "require", "verify-ca", "verify-full"] | None = None  # None: verify-full off loopback
    sslrootcert: str | None = None  # file of the authority that signed the server's certificate
    connect_timeout: Patience = 5.0  # for one connection, TLS included
    command_timeout: Patience = 30.0  # for one statement; then the connection is given up
    idle_close: Seconds = 60.0  # a connection unused for so long is closed
    write_connections: Annotated[int, msgspec.Meta(ge=1, le=2)] = 2  # at most, opened when needed
    read_connections: Annotated[int, msgspec.Meta(ge=1, le=2)] = 2  # at most, opened when needed
    pgbouncer: bool = False  # transaction pooling: no prepared statements that outlive a transaction
    batch_records: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1_000  # in one statement
    batch_bytes: Annotated[int, msgspec.Meta(ge=350 * KIB, title="bytes")] = 4 * MIB  # in one statement
    adopt: Adopted = Adopted()


class DynamoDB(_Section, frozen=True):
    """The DynamoDB store. Credentials come from the standard AWS chain (IRSA, Pod Identity, environment)."""

    table: str = "integration_logs"  # where records go
    fleet_table: str = "integration_logs_fleet"  # where instances and the schedule of shards are kept
    region: str | None = None  # None: AWS_REGION / AWS_DEFAULT_REGION
    endpoint_url: str | None = None  # None: AWS itself
    shards: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4  # per day, for the service and errors indexes
    # write calls under way at most; the regulator stays below
    max_in_flight: Annotated[int, msgspec.Meta(ge=1, le=128)] = 16
    read_in_flight: Annotated[int, msgspec.Meta(ge=1, le=64)] = 8  # read calls of one query under way at most
    # temporary disk (TMPDIR) of one enumeration; where it needs more, the index is read again for the rest
    scan_disk_bytes: Annotated[int, msgspec.Meta(ge=8 * MIB, title="bytes")] = 192 * MIB
    connect_timeout: Patience = 2.0  # for one connection, TLS included
    read_timeout: Patience = 10.0  # for one answer; then the call is repeated
    ttl_days: Annotated[int, msgspec.Meta(ge=1)] | None = None  # counted from log_timestamp, never from write time


class Phases(_Section, frozen=True):
    """Which phase is wanted, and how it may change."""

    max_lag: Seconds = 60.0  # pending records older than this hold reads back from moving, and shadow reads
    min_soak: Seconds = 24 * 3600.0  # time in dual_write_read_dynamo before dynamo_only
    min_quiet: Seconds = 3600.0  # time without old writers on an adopted table before reads move
    min_shadow_reads: Count = 0  # compared without an unexplained mismatch before reads move
    max_validation_age: Seconds = 6 * 3600.0  # a validation of the last 48 h that is older no longer opens a gate


class Validation(_Section, frozen=True):
    """Comparing the two stores, all the time. One instance at a time does it, whichever has the lease."""

    # how often the newest records are compared; 0 = off. Each time DynamoDB's whole service index is read
    interval: Seconds = 3600.0
    window: Annotated[float, msgspec.Meta(ge=48 * 3600, title="seconds")] = 48 * 3600.0  # how far back, to a midnight
    rate: Annotated[float, msgspec.Meta(ge=0)] = 10_000.0  # records of either store a second; 0 = no bound
    # how long sidecars are waited for, and how long a difference must last where not all of them could be asked
    settle: Annotated[float, msgspec.Meta(ge=0, le=600, title="seconds")] = 30.0
    # where somebody removes older rows from PostgreSQL: what it lacks beyond is expired, not missing
    postgres_retention_days: Annotated[int, msgspec.Meta(ge=1)] | None = None


class Control(_Section, frozen=True):
    """Who may change anything."""

    token_file: str | None = None  # None: mutations are off, not open


class Reads(_Section, frozen=True):
    """Who may read, and how much at once."""

    token_file: str | None = None  # reads need this bearer token; None: no token needed
    services: tuple[str, ...] | None = None  # allow-list; None: all
    max_limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1_000  # records of one page at most
    max_days: Annotated[int, msgspec.Meta(ge=1, le=366)] = 31  # widest time range of one query
    count_max_days: Annotated[int, msgspec.Meta(ge=1, le=3660)] = 31  # widest time range of one count
    timeout: Patience = 10.0  # for one query, all its calls together, waiting for its turn included
    in_flight: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4  # reads under way at once, so that they do not slow ingest
    waiting: Count = 64  # reads that wait for their turn; one more is answered 503
    max_page_bytes: Annotated[int, msgspec.Meta(ge=64 * KIB, title="bytes")] = 4 * MIB  # payloads of one page, about
    shadow_sample: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.01  # share of reads repeated on the other store
    shadow_probe: Seconds = 60.0  # a read of its own where applications only write; 0 = off


class Drain(_Section, frozen=True):
    """What SIGTERM does."""

    timeout: Seconds = 25.0  # from SIGTERM to exit; keep it below the pod's grace period
    stop_accepting_before: Seconds = 5.0  # of the deadline: an application may still write its last lines


class Fleet(_Section, frozen=True):
    """How instances move together."""

    # false: this instance decides alone, for one instance and for development; more than one need true
    enabled: bool = False
    heartbeat: Seconds = 10.0  # how often an instance says that it is there, and looks whether a step is due
    fence_after: Seconds = 120.0  # silent for so long, an instance stops deciding for itself: see docs/FLEET.md


class Reload(_Section, frozen=True):
    """How a changed configuration file is noticed."""

    poll: Annotated[float, msgspec.Meta(gt=0, le=60, title="seconds")] = 1.0  # how often the file is looked at


class Logging(_Section, frozen=True):
    """The sidecar's own log: JSON, one line each, never a payload."""

    # lowest that is written; debug: a line for each record that a store has
    level: Literal["debug", "info", "warning", "error"] = "info"


class Assertions(_Section, frozen=True):
    """The specification's flags (L371-382). They assert: a contradiction with the phase's row is refused."""

    writes_to_sql: bool | None = None  # WritesToSql
    writes_to_dynamodb: bool | None = None  # WritesToDynamoDb
    require_both_writes: bool | None = None  # RequireBothWrites
    reads_from_dynamodb: bool | None = None  # ReadsFromDynamoDb


class Settings(_Section, frozen=True):
    """The whole configuration, frozen."""

    phase: Phase = Phase.SQL_ONLY  # the desired phase; applied one adjacent step at a time
    # raise it with each change: a phase with an epoch not above the applied one is refused
    phase_epoch: Count | None = None
    phase_force: str | None = None  # a reason that overrides the gates of a phase change; recorded; never skips a step
    # who says which phase is wanted: this file, or POST /api/migration; with api, the file's phase is that of the start
    phase_authority: Literal["file", "api"] = "file"
    continue_on_write_failure: bool = True  # False: an owed store down for fail_closed_after makes ingest answer 503
    fail_closed_after: Seconds = 60.0  # how long an owed store may be down before that
    instance: str | None = None  # name of this instance in the fleet; None: HOSTNAME
    # how other people's log events become records: POST /ingest/{name} and /v1/logs; see docs/clients/README.md
    mappings: Mappings = msgspec.field(default_factory=dict)
    flags: Assertions = Assertions()
    listen: Listen = Listen()
    ingest: Ingest = Ingest()
    dedup: Dedup = Dedup()
    spool: Spool = Spool()
    retry: Retry = Retry()
    postgres: Postgres = Postgres()
    dynamodb: DynamoDB = DynamoDB()
    phases: Phases = Phases()
    validation: Validation = Validation()
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
        "mappings",
        "retry",
        "phases",
        "reads",
        "validation",
        "drain",
        "logging",
    }
)
"""Top-level keys that a hot reload applies; the rest need a restart."""
