"""The sidecar's own log: JSON, one line per event on stderr, values escaped and cut, never a payload.

Callers name an event in the message and put facts into ``extra``; nothing of a record but its id is ever passed.
Everything that is not plain is turned into text by JSON itself, so no value can start a new line.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Final, TextIO

_STANDARD: Final = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {
    "message",
    "asctime",
    "taskName",
}
_LONGEST: Final = 500  # characters of one value


class JsonFormatter(logging.Formatter):
    """``{"time", "level", "logger", "event", ...extra}``; an exception becomes its type and place, not its values."""

    def format(self, record: logging.LogRecord) -> str:
        """One event as one line of JSON."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage()[:_LONGEST],
        }
        for key, value in record.__dict__.items():
            if key not in _STANDARD:
                line[key] = value if isinstance(value, int | float | bool | None) else str(value)[:_LONGEST]
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
            line["at"] = _places(record.exc_info[1])
        return json.dumps(line, ensure_ascii=True)


def _places(error: BaseException | None) -> list[str]:
    """Where an error came through: file, line, function; exception groups opened. No message: it may quote a value."""
    if isinstance(error, BaseExceptionGroup):
        return [place for inner in error.exceptions for place in [type(inner).__name__, *_places(inner)]][-40:]
    places: list[str] = []
    trace = error.__traceback__ if error is not None else None
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{code.co_filename.rpartition('/')[2]}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return places[-20:]


def configure(level: str, stream: TextIO | None = None) -> None:
    """Send everything at ``level`` and above to ``stream`` (stderr) as JSON; idempotent."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("asyncio", "botocore", "aiobotocore", "aioboto3", "aiohttp.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
