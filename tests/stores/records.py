"""Records for the stores' tests: a plain one to vary, and a strategy that reaches every bound a store must hold.

The bounds are those of the door (semantics, section 1): what is refused there (NUL, lone surrogates, numbers beyond
the column) is not a store's to hold. Times reach from the first to the last microsecond that a four-digit year names.
"""

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from hypothesis import strategies as st

from sidecar.record import LogRecord

DAY: Final = 86_400_000_000  # microseconds
BASE: Final = int(datetime(2026, 1, 15, tzinfo=UTC).timestamp()) * 1_000_000  # a midnight
FIRST_TIME: Final = int(datetime(1, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000
LAST_TIME: Final = int(datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()) * 1_000_000 + 999_999
_PLAIN: Final = LogRecord(
    log_id="",
    application_id=7,
    log_type="INFO",
    service_name="orders",
    request_data='{"b": 1, "a": 1.10, "a": "\\u0000"}',
    response_data=None,
    status_code=200,
    is_success=True,
    error_message=None,
    processing_time_ms=12,
    log_timestamp=BASE,
    correlation_id="corr-1",
    user_id=None,
)


def log_id(number: int) -> str:
    """A UUID whose order is the number's."""
    return str(uuid.UUID(int=(7 << 76) | (2 << 62) | number))


def record(number: int = 0, **changed: Any) -> LogRecord:
    """A plain record with the id of ``number``; ``changed`` fields replace its own."""
    return msgspec.structs.replace(_PLAIN, **({"log_id": log_id(number)} | changed))


def records(number: int, **changed: Any) -> list[LogRecord]:
    """``number`` records, ids and times ascending, a second apart."""
    return [record(i, **({"log_timestamp": BASE + i * 1_000_000} | changed)) for i in range(number)]


def _text(smallest: int, longest: int) -> st.SearchStrategy[str]:
    return st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=smallest, max_size=longest)


def _integer(bits: int) -> st.SearchStrategy[int | None]:
    bound = 2 ** (bits - 1)
    edges = st.sampled_from((-bound, -1, 0, 1, bound - 1))
    return st.none() | edges | st.integers(-bound, bound - 1)


_awkward = st.sampled_from(
    (
        *("", " ", "null", "'", '"', "\\", "\\.", "\\N", "\r\n\t", "\x1b[31m", "\x7f\x80\x9f", "%s%n", "{{x}}"),
        *("\ufeff", "\ufffe\uffff", "e\u0301", "\u00e9", "\U0001f600", "\u202eabc"),  # marks, NFD, NFC, 4 bytes, RTL
        *("' OR 1=1 --", '{"a": 1, "a": 1.10}', "a" * 70_000),
    )
)
_payload = st.none() | _awkward | _text(0, 300)
_short = st.none() | _text(0, 100)


_any_time = st.sampled_from((FIRST_TIME, -1, 0, 1, LAST_TIME)) | st.integers(FIRST_TIME, LAST_TIME)


def log_records(times: st.SearchStrategy[int] = _any_time) -> st.SearchStrategy[LogRecord]:
    """Any record that the door lets in; see ``fresh`` for its id."""
    return st.builds(
        LogRecord,
        log_id=st.just(""),
        application_id=_integer(64),
        log_type=_text(1, 50),
        service_name=_text(1, 100),
        request_data=_payload,
        response_data=_payload,
        status_code=_integer(32),
        is_success=st.booleans(),
        error_message=_payload,
        processing_time_ms=_integer(64),
        log_timestamp=times,
        correlation_id=_short,
        user_id=_short,
    )


def fresh(batch: Sequence[LogRecord]) -> list[LogRecord]:
    """The same with ids that no other example has: the examples of one test share a store."""
    return [msgspec.structs.replace(r, log_id=str(uuid.uuid4())) for r in batch]
