"""What PostgreSQL and its driver may raise, and what each means for delivery: ONE TABLE (semantics, section 5).

A line is looked up by exact SQLSTATE, then by its class (the first two characters), then by the exception's type, in
the order written. What is in no line is UNKNOWN. While connecting no record is at stake, so whatever is neither
TRANSIENT nor THROTTLE holds the whole store: BLOCKED.

Reasons are ours: the condition's name, and constraint, column or table names where they are plain identifiers. The
server's message and DETAIL quote values ("Failing row contains (...)"), so neither is ever used.
"""

import re
import ssl
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

import asyncpg

from sidecar.errors import RetryClass, StoreError
from sidecar.phase import POSTGRES

_TRANSIENT: Final = RetryClass.TRANSIENT
_THROTTLE: Final = RetryClass.THROTTLE
_PERMANENT: Final = RetryClass.PERMANENT
_BLOCKED: Final = RetryClass.BLOCKED


class Line(NamedTuple):
    """One line of the table: what it means and, where the condition's name does not say it, what to do."""

    retry_class: RetryClass
    note: str = ""


BY_SQLSTATE: Final[Mapping[str, Line]] = MappingProxyType(
    {
        # connection and transaction: passes by itself
        "08": Line(_TRANSIENT),  # connection_exception
        "25": Line(_TRANSIENT),  # invalid_transaction_state: ends with the connection, which is not kept
        "25006": Line(_TRANSIENT, "the server is read-only, as a former primary is after a failover"),
        "40": Line(_TRANSIENT),  # transaction_rollback: serialization 40001, deadlock 40P01, unknown outcome 40003
        "40002": Line(_PERMANENT),  # transaction_integrity_constraint_violation
        "53": Line(_TRANSIENT),  # insufficient_resources: disk full, out of memory
        "53300": Line(_THROTTLE, "the server has no connection left"),
        "55006": Line(_TRANSIENT),  # object_in_use
        "55P03": Line(_TRANSIENT),  # lock_not_available
        "57014": Line(_TRANSIENT),  # query_canceled: statement_timeout
        "57P01": Line(_TRANSIENT),  # admin_shutdown
        "57P02": Line(_TRANSIENT),  # crash_shutdown
        "57P03": Line(_TRANSIENT),  # cannot_connect_now: starting up
        "57P05": Line(_TRANSIENT),  # idle_session_timeout
        # Binary data made for the columns of a moment ago: the table was altered under a cached description. The
        # connection is not kept, and the next one looks again.
        "08P01": Line(_TRANSIENT, "the table's columns changed?"),
        "22P03": Line(_TRANSIENT, "the table's columns changed"),
        "22P04": Line(_TRANSIENT, "the table's columns changed"),
        # this record, as data
        "22": Line(_PERMANENT),  # data_exception: NUL 22021, too long 22001, out of range 22003
        "23502": Line(_PERMANENT),  # not_null_violation
        "23503": Line(_PERMANENT),  # foreign_key_violation; the shipper gives the parent row fk_grace to appear
        "23505": Line(_PERMANENT),  # unique_violation of another constraint than log_id's
        "23514": Line(_PERMANENT),  # check_violation
        "23P01": Line(_PERMANENT),  # exclusion_violation
        "44000": Line(_PERMANENT),  # with_check_option_violation of a view
        "54": Line(_PERMANENT),  # program_limit_exceeded: an index row too large
        "P0001": Line(_PERMANENT),  # raise_exception: a trigger refuses
        # the store as a whole, until somebody mends it
        "0A": Line(_BLOCKED),  # feature_not_supported: INSERT rules, COPY with row-level security
        "26": Line(_BLOCKED, "a pooler between us? then set postgres.pgbouncer: true"),
        "28": Line(_BLOCKED, "user, password or pg_hba.conf"),
        "3D": Line(_BLOCKED, "postgres.database names no database there"),
        "3F": Line(_BLOCKED, "postgres.schema names no schema there"),
        "42": Line(_BLOCKED),  # undefined table, missing privilege, another column type
        "42501": Line(_BLOCKED, "grant what is missing; all that is needed stands in docs/STORES.md"),
        "42P01": Line(_BLOCKED, "the table is missing"),
        "42P05": Line(_BLOCKED, "a pooler between us? then set postgres.pgbouncer: true"),
        "42P10": Line(_BLOCKED, "log_id needs a unique index of its own"),
        "57P04": Line(_BLOCKED, "the database was dropped"),
        "58": Line(_BLOCKED),  # system_error: the server's own disk
        "F0": Line(_BLOCKED),  # config_file_error
        "XX": Line(_BLOCKED),  # internal_error, data_corrupted
    }
)

BY_TYPE: Final[tuple[tuple[type[Exception], str, Line], ...]] = (
    # Raised by the driver, without an answer of the server; the first line whose type fits counts.
    (
        ssl.SSLCertVerificationError,
        "tls_certificate",
        Line(_BLOCKED, "the server's certificate was refused"),
    ),  # a ValueError too
    (asyncpg.ClientConfigurationError, "client_configuration", Line(_BLOCKED)),
    (UnicodeError, "client_encoding", Line(_PERMANENT, "a text that is not valid Unicode")),
    (OverflowError, "client_range", Line(_PERMANENT, "a number or time out of the column's range")),
    (ValueError, "client_data", Line(_PERMANENT, "a value that its column's type cannot hold")),
    (asyncpg.InterfaceError, "client_interface", Line(_TRANSIENT, "the connection was not usable")),
    (asyncpg.InternalClientError, "client_protocol", Line(_TRANSIENT, "the connection was not usable")),
    (TimeoutError, "timeout", Line(_TRANSIENT, "no answer in time")),
    (ssl.SSLError, "tls", Line(_TRANSIENT, "TLS failed")),
    (ConnectionRefusedError, "connection_refused", Line(_TRANSIENT, "nothing listens there")),
    (OSError, "connection_lost", Line(_TRANSIENT, "the connection failed")),
)

_STALE: Final = Line(_TRANSIENT, "the table's columns changed")
_TLS_REFUSED: Final = ("tls_refused", Line(_BLOCKED, "the server speaks no TLS; see postgres.sslmode"))
_REST: Final = Line(RetryClass.UNKNOWN)
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_$]{0,62}", re.ASCII)
_DENIED: Final = re.compile(
    r'permission denied for (table|schema|sequence|function|view|database) "?([A-Za-z_][A-Za-z0-9_$]{0,62})"?', re.ASCII
)
"""What a server that speaks English says; of this error it names the object nowhere else."""
_WORD: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_SPENT: Final = frozenset({"08", "25", "26", "0A", "22P03", "22P04", "42P05"})
"""Answers after which the connection is not used again: the next one may find another server or another table."""


def translate(error: Exception, *, connecting: bool = False) -> StoreError:
    """``error`` as the port's own; holds nothing of the driver's text.

    Args:
        error: what the driver raised.
        connecting: no record was at stake yet, so nothing can be a record's fault.
    """
    code, condition, line = _look_up(error)
    retry_class = line.retry_class
    if connecting and retry_class not in (_TRANSIENT, _THROTTLE):
        retry_class = _BLOCKED
    named = [
        f"{kind} {name}"
        for kind in ("table", "constraint", "column")
        if (name := getattr(error, f"{kind}_name", None)) and _NAME.fullmatch(name)
    ]
    denied = _DENIED.fullmatch(str(error)) if code == "42501" else None
    if denied is not None:
        named = [f"{denied[1]} {denied[2]}"]
    reason = f"{condition} ({', '.join(named)})" if named else condition
    return StoreError(POSTGRES, retry_class, f"{reason}: {line.note}" if line.note else reason, code)


def spends_connection(error: BaseException) -> bool:
    """True where the connection must not be used again after ``error``.

    Only a plain answer of the server leaves it as it was; whatever else happened, a cancellation among it, the
    state of the conversation is unknown.
    """
    if not isinstance(error, asyncpg.PostgresError):
        return True
    state = error.sqlstate or ""
    return not _SPENT.isdisjoint((state, state[:2]))


def _look_up(error: Exception) -> tuple[str, str, Line]:
    """Code, name of the condition, line of the table."""
    state = getattr(error, "sqlstate", None)
    if isinstance(state, str) and state:
        line = BY_SQLSTATE.get(state) or BY_SQLSTATE.get(state[:2]) or _REST
        if isinstance(error, asyncpg.InvalidCachedStatementError):
            line = _STALE  # its SQLSTATE, 0A000, means something else
        return state, _condition(type(error)), line
    if type(error) is ConnectionError and "rejected SSL" in str(error):
        return "", *_TLS_REFUSED  # the driver has no type of its own for this
    for kind, condition, line in BY_TYPE:
        if isinstance(error, kind):
            return "", condition, line
    return "", f"unexpected {type(error).__name__}", _REST


def _condition(kind: type[Exception]) -> str:
    """``UniqueViolationError`` -> ``unique_violation``."""
    return _WORD.sub("_", kind.__name__.removesuffix("Error")).lower()
