"""The one bounded decoder of request bodies.

INVARIANTS

* A body counts only when it is whole: Content-Length reached, last chunk seen, and the compressed stream's own end
  mark with its checksum read. A cut or corrupt one is MalformedBody; aiohttp's own decoder accepts a cut one silently.
* Never more than ``limit`` bytes of one body are held, compressed or inflated; inflating stops at the bound, whatever
  the stream would still give.
* All bodies being read share one budget, so that many slow clients cannot fill the memory (P13).
* Content-Length and chunked bodies are treated alike.
"""

import asyncio
import zlib
from typing import Final, Protocol

from aiohttp import StreamReader, http_exceptions, web

from sidecar.errors import Busy, MalformedBody, TooLarge, UnsupportedMedia

_GZIP: Final = 31  # zlib's window bits: gzip wrapper
_ZLIB: Final = 15
_RAW_DEFLATE: Final = -15
_INFLATE_STEP: Final = 256 * 1024  # bytes between two looks at the event loop
_MOST_MEMBERS: Final = 1_000  # of one gzip body
_FREE: Final = 64 * 1024  # bytes of each body that the shared budget does not count

ENCODINGS: Final = frozenset({"gzip", "x-gzip", "deflate", "identity", ""})


class _Inflater(Protocol):
    """What of zlib's decompression object is used (its class has no name at run time)."""

    @property
    def eof(self) -> bool: ...
    @property
    def unconsumed_tail(self) -> bytes: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = 0, /) -> bytes: ...


class BodyTimeout(MalformedBody):
    """The body did not arrive in time."""


class Budget:
    """Bytes that all bodies being read may hold together; ``limit`` in bytes."""

    __slots__ = ("_limit", "_used")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0

    def take(self, size: int) -> None:
        """Raises Busy when there is no room for ``size`` more bytes."""
        if self._used + size > self._limit:
            raise Busy("memory", "too many large bodies at once; send again shortly or send smaller batches", 1)
        self._used += size

    def give(self, size: int) -> None:
        """Return what was taken."""
        self._used -= size


def encoding_of(request: web.BaseRequest) -> str:
    """The request's content coding: one of ``ENCODINGS``.

    Raises:
        UnsupportedMedia: another coding, or several.
    """
    value = request.headers.get("Content-Encoding")
    if value is None:
        return ""
    coding = value.strip().lower()
    if coding not in ENCODINGS or len(request.headers.getall("Content-Encoding")) > 1:
        raise UnsupportedMedia("Content-Encoding: allowed is one of gzip, deflate, identity; send one of them or none")
    return coding


async def read_body(request: web.BaseRequest, coding: str, *, limit: int, patience: float, budget: Budget) -> bytes:
    """The decoded body, whole.

    Raises:
        MalformedBody: cut short, corrupt, wrongly framed.
        BodyTimeout: not here after ``patience`` seconds.
        TooLarge: more than ``limit`` bytes, sent or inflated.
        Busy: too many large bodies at once.
        ConnectionError: the client has gone.
    """
    content = request.content
    if content.is_eof() and coding in ("", "identity"):  # the usual case: it came with the headers
        whole = _nowait(content)
        if len(whole) > limit:
            raise too_large(limit)
        return whole
    announced = request.content_length
    if announced is not None and announced > limit:
        raise too_large(limit)
    body = _Body(limit, budget)
    try:
        async with asyncio.timeout(patience):
            await (_plain(content, body) if coding in ("", "identity") else _inflated(content, coding, body))
    except TimeoutError:
        raise BodyTimeout(
            f"the body was not complete after {patience:g} s; send it faster or in smaller parts"
        ) from None
    except (web.RequestPayloadError, http_exceptions.HttpProcessingError) as error:
        raise _framing(error) from None
    except RuntimeError:  # how the stream reader says that nobody is there to read from
        if request.transport is not None:
            raise
        raise ConnectionResetError("the client has gone") from None
    finally:
        body.release()
    return body.whole()


class _Body:
    """The decoded parts so far, within the bound and the budget."""

    __slots__ = ("_budget", "_parts", "_taken", "limit", "size")

    def __init__(self, limit: int, budget: Budget) -> None:
        self.limit = limit
        self._budget = budget
        self._parts: list[bytes] = []
        self._taken = 0
        self.size = 0

    @property
    def room(self) -> int:
        """Bytes that may still come."""
        return self.limit - self.size

    def add(self, part: bytes) -> None:
        self.size += len(part)
        if self.size > self.limit:
            raise too_large(self.limit)
        over = self.size - _FREE - self._taken
        if over > 0:
            self._budget.take(over)
            self._taken += over
        self._parts.append(part)

    def release(self) -> None:
        self._budget.give(self._taken)
        self._taken = 0

    def whole(self) -> bytes:
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)


def _nowait(content: StreamReader) -> bytes:
    try:
        return content.read_nowait()
    except (web.RequestPayloadError, http_exceptions.HttpProcessingError) as error:
        raise _framing(error) from None


def _framing(error: Exception) -> MalformedBody:
    return MalformedBody(f"the body's framing is broken ({type(error).__name__}); nothing was stored")


def too_large(limit: int) -> TooLarge:
    """The error of a body over ``limit`` bytes."""
    return TooLarge(f"the body is larger than {limit} bytes (after decompression); send fewer records at a time")


async def _plain(content: StreamReader, body: _Body) -> None:
    while part := await content.readany():
        body.add(part)


async def _inflated(content: StreamReader, coding: str, body: _Body) -> None:
    stream = _Stream(coding, body)
    sent = 0
    while part := await content.readany():
        sent += len(part)
        if sent > body.limit:
            raise too_large(body.limit)
        await stream.feed(part)
    stream.end()


class _Stream:
    """A gzip or deflate stream being inflated into a ``_Body``; gzip may have several members, as RFC 1952 says."""

    def __init__(self, coding: str, body: _Body) -> None:
        self._gzip = coding in ("gzip", "x-gzip")
        self._body = body
        self._inflater: _Inflater | None = None
        self._members = 0
        self._head = b""

    async def feed(self, data: bytes) -> None:
        while data:
            if self._inflater is None:
                data = self._begin(data)
                if self._inflater is None:
                    return  # the first byte alone does not tell the kind of stream
            try:
                part = self._inflater.decompress(data, min(_INFLATE_STEP, self._body.room + 1))
            except zlib.error:
                raise MalformedBody(
                    "the compressed body is corrupt (wrong format or checksum); compress it again"
                ) from None
            self._body.add(part)
            if self._inflater.eof:
                data = self._inflater.unused_data
                self._finish(data)
            else:
                data = self._inflater.unconsumed_tail
            if len(part) == _INFLATE_STEP:
                await asyncio.sleep(0)

    def _begin(self, data: bytes) -> bytes:
        if self._gzip:
            self._inflater = zlib.decompressobj(_GZIP)
            return data
        data, self._head = self._head + data, b""
        if len(data) < 2:  # noqa: PLR2004  (a zlib header has two bytes)
            self._head = data
            return data
        zlib_header = data[0] & 0x0F == 8 and (data[0] << 8 | data[1]) % 31 == 0  # noqa: PLR2004  (RFC 1950)
        self._inflater = zlib.decompressobj(_ZLIB if zlib_header else _RAW_DEFLATE)  # some clients send it bare
        return data

    def _finish(self, rest: bytes) -> None:
        self._members += 1
        if not rest:
            if self._gzip:
                self._inflater = None
            return
        if not self._gzip or self._members >= _MOST_MEMBERS:
            raise MalformedBody("bytes follow the end of the compressed body; send one stream")
        self._inflater = None

    def end(self) -> None:
        """The body has ended: so must the stream have."""
        inside = self._inflater is not None and not self._inflater.eof
        if inside or self._head or not self._members:
            raise MalformedBody("the compressed body is cut short: its end mark is missing; send all of it")
