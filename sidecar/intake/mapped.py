"""Records that a mapping made (``sidecar.mapping``) through the same screening as those that a client wrote.

All texts go through the fast lane as one array. Where it doubts, each is screened by itself, so that whatever is wrong
with one record never becomes the request's error. A refused record's source is the event as it was sent.
"""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

from sidecar.errors import InvalidRecord, MalformedBody, TooLarge
from sidecar.mapping import Mapped
from sidecar.screening import Form, Refused, Rule, Screened, Screener
from sidecar.settings import Ingest

_BETWEEN_PAUSES: Final = 64  # records of the slow lane


async def screen_mapped(
    screener: Screener, mapped: Mapped, ingest: Ingest, pause: Callable[[], Awaitable[None]]
) -> Screened:
    """Screen the records of ``mapped``; their places and those of the refused are the events' in the request."""
    bounds = screener.bounds(ingest)
    fast = screener.whole(b"[" + b",".join(mapped.texts) + b"]", Form.JSON, bounds, ingest.max_records, None)
    if fast is not None:
        fast.total, fast.indexes, fast.refused = mapped.total, mapped.indexes, list(mapped.refused)
        return fast
    result = Screened(batch=True, total=mapped.total, refused=list(mapped.refused))
    indexes: list[int] = []
    for position, (index, text) in enumerate(zip(mapped.indexes, mapped.texts, strict=True)):
        if position % _BETWEEN_PAUSES == _BETWEEN_PAUSES - 1:
            await pause()
        one = _alone(screener, text, ingest)
        result.refused += [replace(each, index=index, raw=mapped.sources[position]) for each in one.refused]
        if one.records:
            indexes.append(index)
            result.records += one.records
            result.encoded += one.encoded
            result.contents += one.contents
    result.indexes = indexes
    result.refused.sort(key=lambda each: each.index)
    return result


def _alone(screener: Screener, text: bytes, ingest: Ingest) -> Screened:
    try:
        return screener.screen(text, Form.JSON, ingest)
    except (MalformedBody, InvalidRecord, TooLarge) as why:
        reason = f"this event: {why}"
        return Screened(batch=True, refused=[Refused(0, "record", Rule.MALFORMED, reason, text)])
