"""Every error of the sidecar, in one tree.

::

    SidecarError
    +-- ConfigError            a setting is unreadable, unknown, contradictory or out of range
    +-- BadRequest             the client's to mend; nothing was stored
    |   +-- MalformedBody          not JSON, not UTF-8, cut short, corrupt compression
    |   +-- UnsupportedMedia       media type or content encoding that we do not read
    |   +-- TooLarge               body, record or number of records over its bound
    |   +-- InvalidRecord          one record breaks a rule; names the field
    |   +-- ContentConflict        the same log_id came before with other content
    |   +-- NotFound               nothing under that name here
    |   +-- Unauthorized           no token, or a wrong one
    |   +-- Forbidden              a Host that is not this machine; a service that is not allowed
    +-- Busy                   try again after ``retry_after`` seconds; nothing was stored
    +-- SpoolError
    |   +-- SpoolLocked            another sidecar holds this spool
    |   +-- SpoolRefused           this directory cannot give the promise (volatile, newer schema, not ours)
    |   +-- SpoolFailed            EIO or a failed fsync: no further 2xx, exit, recover at start
    +-- SidecarUnreachable     a command found no running sidecar to ask, or lost it
    +-- StoreError             a store refused or could not be reached; ``retry_class`` says what helps

Which HTTP status each becomes is one table in ``sidecar.api.errors``. Messages never carry a payload or a secret.
"""

from enum import StrEnum


class RetryClass(StrEnum):
    """What a store's answer means for delivery (semantics, section 5)."""

    TRANSIENT = "transient"  # passes by itself: back off, no attempt limit
    THROTTLE = "throttle"  # passes when we slow down: fewer in flight; never counts as an attempt
    PERMANENT = "permanent"  # this record, as data, will never be taken: bisect, dead-letter it alone
    CONFLICT = "conflict"  # same id, other content: dead letter
    BLOCKED = "blocked"  # nothing gets through until somebody mends the store: hold, alarm, probe
    UNKNOWN = "unknown"  # a few tries alone, then dead letter; many in a row mean blocked


class SidecarError(Exception):
    """Root of all errors raised on purpose."""


class ConfigError(SidecarError):
    """A setting cannot be used: says which, what was seen, what is allowed and what to do."""

    def __init__(self, setting: str, *, seen: object, allowed: str, hint: str = "") -> None:
        self.setting = setting
        self.seen = seen
        self.allowed = allowed
        self.hint = hint
        tail = f"; {hint}" if hint else ""
        super().__init__(f"{setting}: seen {seen!r}, allowed: {allowed}{tail}")


class BadRequest(SidecarError):
    """The request is at fault; sending the same again will fail again."""


class MalformedBody(BadRequest):
    """The body cannot be read as what it claims to be."""


class UnsupportedMedia(BadRequest):
    """A media type or content encoding that is not read here."""


class TooLarge(BadRequest):
    """A body, a record or a number of records is over its bound."""


class InvalidRecord(BadRequest):
    """One record breaks a rule of the schema."""

    def __init__(self, field: str, reason: str) -> None:
        self.field = field
        self.reason = reason
        super().__init__(f"{field}: {reason}")


class ContentConflict(BadRequest):
    """A record with this log_id was accepted before with other content; the first wins."""


class NotFound(BadRequest):
    """Nothing under that name here."""


class Unauthorized(BadRequest):
    """The bearer token is missing or wrong, or no token file is configured."""


class Forbidden(BadRequest):
    """The request's Host or service is not on the allow-list."""


class Busy(SidecarError):
    """Nothing was stored; try again after ``retry_after`` seconds."""

    def __init__(self, reason: str, message: str, retry_after: int) -> None:
        self.reason = reason
        self.retry_after = retry_after
        super().__init__(message)


class SpoolError(SidecarError):
    """The local buffer cannot be used."""


class SpoolLocked(SpoolError):
    """Another process holds this spool."""


class SpoolRefused(SpoolError):
    """This directory cannot give the promise: volatile file system, newer schema, wrong owner."""


class SpoolFailed(SpoolError):
    """The disk failed under the spool. Never retried: stop, exit non-zero, recover at the next start (P8)."""


class SidecarUnreachable(SidecarError):
    """No sidecar answers where the command looks for one, or the connection broke."""


class StoreError(SidecarError):
    """A store refused a whole call or could not be reached.

    ``reason`` is safe to show (never a row's values), ``code`` is the SQLSTATE or the AWS error code.
    """

    def __init__(self, store: str, retry_class: RetryClass, reason: str, code: str = "") -> None:
        self.store = store
        self.retry_class = retry_class
        self.reason = reason
        self.code = code
        super().__init__(f"{store}: {reason}" + (f" [{code}]" if code else ""))
