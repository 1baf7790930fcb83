"""What no single setting can tell: rules between settings, each one function of the table ``CHECKS``.

They hold for every Settings in force: at start, and for the mixture of old and new that a hot reload makes.
FAILURE: the first broken rule is a ConfigError that names the setting to change. ``warnings`` names what is allowed
but wants a person's attention; it refuses nothing.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from sidecar.errors import ConfigError
from sidecar.phase import DYNAMODB, TABLE
from sidecar.settings import Settings

_PORT: Final = re.compile(r"[0-9]{1,5}", re.ASCII)
_SQL_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}", re.ASCII)
_TABLE_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{3,255}", re.ASCII)
_REGION: Final = re.compile(r"[a-z0-9-]{2,40}", re.ASCII)
MAX_REASON: Final = 500  # characters of phase_force


def check(settings: Settings) -> None:
    """Raise for the first rule that the settings break.

    Raises:
        ConfigError: names the setting, what was seen, what is allowed and what to do.
    """
    for rule in CHECKS:
        rule(settings)


def _flags(s: Settings) -> None:
    """`flags` state what the phase means (they assert, they change nothing)."""
    row = TABLE[s.phase].flags
    for name, meant in row.items():
        stated = getattr(s.flags, name)
        if stated is not None and stated is not meant:
            raise ConfigError(
                f"flags.{name}",
                seen=str(stated).lower(),
                allowed=f"{str(meant).lower()} in phase {s.phase.label}",
                hint="flags only assert what the phase means: remove the line, or change the phase",
            )


def _force(s: Settings) -> None:
    """`phase_force` is a reason of 1 to 500 characters."""
    if s.phase_force is not None and (not s.phase_force.strip() or len(s.phase_force) > MAX_REASON):
        raise ConfigError(
            "phase_force",
            seen=f"a text of {len(s.phase_force)} characters",
            allowed=f"a reason of 1 to {MAX_REASON} characters",
            hint="say why the gates are overridden; it is recorded",
        )


def _watermarks(s: Settings) -> None:
    """`spool.low_watermark` is below `spool.high_watermark`."""
    if s.spool.low_watermark >= s.spool.high_watermark:
        raise ConfigError(
            "spool.low_watermark",
            seen=s.spool.low_watermark,
            allowed=f"below spool.high_watermark ({s.spool.high_watermark:g})",
            hint="lower it: ingest is accepted again below the low one",
        )


def _ballast(s: Settings) -> None:
    """`spool.ballast_bytes` is at most `spool.cap_bytes`."""
    if s.spool.ballast_bytes > s.spool.cap_bytes:
        raise ConfigError(
            "spool.ballast_bytes",
            seen=s.spool.ballast_bytes,
            allowed=f"at most spool.cap_bytes ({s.spool.cap_bytes})",
            hint="lower it: the volume must hold both",
        )


def _shares(s: Settings) -> None:
    """Two stores' `spool.dead_letter_share` and `spool.refused_share` together are below `spool.low_watermark`."""
    reserved = 2 * s.spool.dead_letter_share + s.spool.refused_share
    if reserved >= s.spool.low_watermark:
        raise ConfigError(
            "spool.dead_letter_share",
            seen=s.spool.dead_letter_share,
            allowed="two stores' dead letters and the refused together below spool.low_watermark",
            hint="lower it, or ingest could stay refused with nothing left to deliver",
        )


def _record_in_body(s: Settings) -> None:
    """`ingest.max_body_bytes` is at least `ingest.max_record_bytes`."""
    if s.ingest.max_record_bytes > s.ingest.max_body_bytes:
        raise ConfigError(
            "ingest.max_body_bytes",
            seen=s.ingest.max_body_bytes,
            allowed=f"at least ingest.max_record_bytes ({s.ingest.max_record_bytes})",
            hint="raise it, or the largest record could never be sent",
        )


def _body_in_spool(s: Settings) -> None:
    """`ingest.max_body_bytes` is at most `spool.cap_bytes * spool.low_watermark`."""
    room = int(s.spool.cap_bytes * s.spool.low_watermark)
    if s.ingest.max_body_bytes > room:
        raise ConfigError(
            "ingest.max_body_bytes",
            seen=s.ingest.max_body_bytes,
            allowed=f"at most spool.cap_bytes * spool.low_watermark ({room})",
            hint="lower it or raise the cap, or the largest request could never be accepted",
        )


def _checkpoint(s: Settings) -> None:
    """`spool.checkpoint_bytes` is at most a quarter of `spool.cap_bytes`."""
    if s.spool.checkpoint_bytes > s.spool.cap_bytes // 4:
        raise ConfigError(
            "spool.checkpoint_bytes",
            seen=s.spool.checkpoint_bytes,
            allowed=f"at most a quarter of spool.cap_bytes ({s.spool.cap_bytes // 4})",
            hint="lower it: the write-ahead log counts towards the cap",
        )


_POSITIVE: Final[Mapping[str, Callable[[Settings], float]]] = {
    "listen.header_timeout": lambda s: s.listen.header_timeout,
    "listen.body_timeout": lambda s: s.listen.body_timeout,
    "listen.idle_timeout": lambda s: s.listen.idle_timeout,
    "ingest.max_body_bytes": lambda s: s.ingest.max_body_bytes,
    "retry.delay": lambda s: s.retry.delay,
    "retry.probe_interval": lambda s: s.retry.probe_interval,
    "postgres.connect_timeout": lambda s: s.postgres.connect_timeout,
    "postgres.command_timeout": lambda s: s.postgres.command_timeout,
    "dynamodb.connect_timeout": lambda s: s.dynamodb.connect_timeout,
    "dynamodb.read_timeout": lambda s: s.dynamodb.read_timeout,
    "reads.timeout": lambda s: s.reads.timeout,
    "fleet.heartbeat": lambda s: s.fleet.heartbeat,
}


def _positive(s: Settings) -> None:
    """Timeouts, `retry.delay`, `retry.probe_interval` and `fleet.heartbeat` are above 0."""
    for name, value in _POSITIVE.items():
        if value(s) <= 0:
            raise ConfigError(name, seen=value(s), allowed="above 0", hint="a bound of zero would let nothing pass")


def _back_off(s: Settings) -> None:
    """`retry.delay` is at most `retry.max_delay`."""
    if s.retry.delay > s.retry.max_delay:
        raise ConfigError(
            "retry.delay",
            seen=s.retry.delay,
            allowed=f"at most retry.max_delay ({s.retry.max_delay:g} s)",
            hint="lower it or raise the cap",
        )


def _drain(s: Settings) -> None:
    """`drain.stop_accepting_before` is at most `drain.timeout`."""
    if s.drain.stop_accepting_before > s.drain.timeout:
        raise ConfigError(
            "drain.stop_accepting_before",
            seen=s.drain.stop_accepting_before,
            allowed=f"at most drain.timeout ({s.drain.timeout:g} s)",
            hint="lower it: it is the end of the drain's own time",
        )


def _fence(s: Settings) -> None:
    """`fleet.fence_after` is at least three times `fleet.heartbeat`."""
    if s.fleet.fence_after < 3 * s.fleet.heartbeat:
        raise ConfigError(
            "fleet.fence_after",
            seen=s.fleet.fence_after,
            allowed=f"at least three times fleet.heartbeat ({3 * s.fleet.heartbeat:g} s)",
            hint="raise it, or one late heartbeat fences an instance",
        )


def _listeners(s: Settings) -> None:
    """`listen.app` and `listen.ops` are different addresses: host:port, [v6]:port or unix:/path."""
    for name, value in (("listen.app", s.listen.app), ("listen.ops", s.listen.ops)):
        if not _is_address(value):
            raise ConfigError(
                name,
                seen=value[:60],
                allowed="host:port with a port of 0..65535, [v6]:port, or unix:/absolute/path",
                hint="correct the address",
            )
    if s.listen.app == s.listen.ops and not s.listen.app.endswith(":0"):
        raise ConfigError(
            "listen.ops", seen=s.listen.ops, allowed="another address than listen.app", hint="change one of the two"
        )


def _is_address(value: str) -> bool:
    if value.startswith("unix:"):
        return value.startswith("unix:/") and len(value) <= len("unix:") + 107  # sun_path holds 108 bytes
    host, _, port = value.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    return bool(host) and (":" not in host or bracketed) and is_port(port)


def is_port(text: str) -> bool:
    """Whether a text is a TCP port; of five digits at most, because int() itself fails beyond some thousand."""
    return _PORT.fullmatch(text) is not None and int(text) <= 65535  # noqa: PLR2004  (TCP's own bound)


def _postgres_names(s: Settings) -> None:
    """`postgres.schema` and `postgres.table` are plain SQL names."""
    for name, value in (("postgres.schema", s.postgres.schema), ("postgres.table", s.postgres.table)):
        if not _SQL_NAME.fullmatch(value):
            raise ConfigError(
                name,
                seen=value[:80],
                allowed="letters, digits and _, not beginning with a digit, at most 63",
                hint="rename it",
            )


_ZONE: Final = re.compile(r"UTC|[+-](0[0-9]|1[0-4]):[0-5][0-9]", re.ASCII)


def _adopted(s: Settings) -> None:
    """`postgres.adopt` names plain, different columns; `assume_zone` is `UTC` or a fixed offset."""
    adopt = s.postgres.adopt
    names = {"key": adopt.key, "log_id": adopt.log_id} | {
        f"columns.{field}": getattr(adopt.columns, field) for field in adopt.columns.__struct_fields__
    }
    taken: dict[str, str] = {}
    for field, name in names.items():
        if not _SQL_NAME.fullmatch(name):
            raise ConfigError(
                f"postgres.adopt.{field}",
                seen=name[:80],
                allowed="a column's name as the catalogue has it: letters, digits and _, at most 63",
                hint="quotes are put by the sidecar; a column with another name cannot be mapped",
            )
        if name in taken:
            raise ConfigError(
                f"postgres.adopt.{field}",
                seen=name,
                allowed=f"another column than postgres.adopt.{taken[name]}",
                hint="each field has a column of its own",
            )
        taken[name] = field
    if adopt.assume_zone is not None and not _ZONE.fullmatch(adopt.assume_zone):
        raise ConfigError(
            "postgres.adopt.assume_zone",
            seen=adopt.assume_zone[:60],
            allowed="UTC, or a fixed offset such as +02:00",
            hint="a zone with daylight saving names one hour of each year twice, so a record of that hour could not be"
            " given back as it was; make the column a timestamptz instead (docs/ADOPTING.md)",
        )


def _password(s: Settings) -> None:
    """`postgres.password` and `postgres.password_file` are not both stated."""
    if s.postgres.password is not None and s.postgres.password_file is not None:
        raise ConfigError(
            "postgres.password",
            seen="***",
            allowed="postgres.password or postgres.password_file, not both",
            hint="remove one of the two",
        )


def _dynamodb_names(s: Settings) -> None:
    """`dynamodb.table` and `dynamodb.fleet_table` are different DynamoDB names; the region looks like one."""
    for name, value in (("dynamodb.table", s.dynamodb.table), ("dynamodb.fleet_table", s.dynamodb.fleet_table)):
        if not _TABLE_NAME.fullmatch(value):
            raise ConfigError(name, seen=value[:80], allowed="3 to 255 of a-z A-Z 0-9 _ . -", hint="rename it")
    if s.dynamodb.table == s.dynamodb.fleet_table:
        raise ConfigError(
            "dynamodb.fleet_table",
            seen=s.dynamodb.fleet_table,
            allowed="another table than dynamodb.table",
            hint="rename one of the two",
        )
    if s.dynamodb.region is not None and not _REGION.fullmatch(s.dynamodb.region):
        raise ConfigError(
            "dynamodb.region",
            seen=s.dynamodb.region[:60],
            allowed="a region such as us-east-1",
            hint="correct the name",
        )


def _endpoint(s: Settings) -> None:
    """`dynamodb.endpoint_url` is http(s)://host[:port] without a user."""
    if s.dynamodb.endpoint_url is None:
        return
    try:
        url = urlsplit(s.dynamodb.endpoint_url)
        good = url.scheme in ("http", "https") and bool(url.hostname) and url.username is None and url.port != 0
    except ValueError:  # a port that is no number, brackets that do not close
        good = False
    if not good:
        raise ConfigError(
            "dynamodb.endpoint_url",
            seen="another form",  # it may carry a user and a password
            allowed="http://host[:port] or https://host[:port], without a user",
            hint="leave it out for AWS itself",
        )


CHECKS: Final[Sequence[Callable[[Settings], None]]] = (
    _flags,
    _force,
    _watermarks,
    _ballast,
    _shares,
    _record_in_body,
    _body_in_spool,
    _checkpoint,
    _positive,
    _back_off,
    _drain,
    _fence,
    _listeners,
    _postgres_names,
    _adopted,
    _password,
    _dynamodb_names,
    _endpoint,
)


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    host = host.strip("[]")
    if host == "localhost" or host.startswith("/"):  # PostgreSQL's socket directory
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def warnings(settings: Settings, environ: Mapping[str, str]) -> tuple[str, ...]:
    """What is allowed and yet wants attention, one sentence each."""
    found: list[str] = []
    app_host = settings.listen.app.rpartition(":")[0]
    if not settings.listen.app.startswith("unix:") and not is_loopback(app_host):
        found.append(f"listen.app: {settings.listen.app} is reachable from other machines; ingest has no token")
    if settings.postgres.sslmode == "disable" and not is_loopback(settings.postgres.host):
        found.append("postgres.sslmode: disable sends records and the password in clear text to another machine")
    region_known = settings.dynamodb.region or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    if DYNAMODB in TABLE[settings.phase].owed and not region_known:
        found.append("dynamodb.region: neither it nor AWS_REGION is set; the phase writes to DynamoDB")
    endpoint = settings.dynamodb.endpoint_url
    if endpoint and endpoint.startswith("http://") and not is_loopback(urlsplit(endpoint).hostname or ""):
        found.append("dynamodb.endpoint_url: http sends records in clear text to another machine")
    if settings.spool.ballast_bytes == 0:
        found.append("spool.ballast_bytes: 0 leaves nothing to give back when the disk is full")
    if settings.spool.allow_volatile:
        found.append("spool.allow_volatile: records answered with 202 may not survive the volume's loss of power")
    if settings.phase_force is not None:
        found.append("phase_force: gates of a phase change are overridden while it is set")
    return tuple(found)
