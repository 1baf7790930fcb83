"""The express lane: the common ``POST /logs``, read and answered beside aiohttp's general machinery.

An empty handler costs aiohttp about 34 us, reading a body 6 to 11 more, the middleware and the response object 15; a
single record's way through this sidecar is of that order too. So a connection whose requests are all of the one
common form is served here; everything else is aiohttp's.

WHAT IS EXPRESS: ``POST /logs HTTP/1.1`` whose head arrived whole, has only headers of ``_KNOWN``, each once, an allowed
Host and a Content-Length of at most ``LONGEST``. No query, no chunked or compressed body, no Prefer, no key.

INVARIANTS

* Doubt never refuses: whatever is not understood exactly goes to aiohttp, byte for byte, from the first byte of that
  request on, and the connection stays with aiohttp until it closes. Both lanes give the same answers
  (``tests/api/test_express.py`` compares them).
* Plain single records that arrive in one turn of the loop, on however many connections, are screened and appended
  together, which costs a fifth less than one by one (89 instead of 110 us a record at 32 connections). Nothing that one
  of them is or does reaches another: a body in doubt goes its own way, and each answer is the one that it would have
  had alone. What the append as a whole meets (full, failed) each of them is told.
* One request of a connection at a time; what a client pipelines waits, and reading stops while it does.
* A body is bounded in time (``listen.body_timeout``) and by the budget that all bodies share.
"""

import asyncio
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from email.utils import formatdate
from http import HTTPStatus
from typing import Final, NamedTuple

import msgspec
from aiohttp import web
from prometheus_client import Counter

from sidecar.api import errors, ingest
from sidecar.api.body import BodyTimeout, too_large
from sidecar.api.parts import ApiParts
from sidecar.errors import SidecarError, UnsupportedMedia
from sidecar.intake import Plain
from sidecar.screening import Form

LONGEST: Final = 256 * 1024  # bytes of a body; a longer one is worth aiohttp's care
EXPRESS: web.AppKey["Express"] = web.AppKey("express")

_REQUEST_LINE: Final = b"POST /logs HTTP/1.1"
_KNOWN: Final = frozenset(
    {
        b"host",
        b"content-type",
        b"content-length",
        b"connection",
        b"user-agent",
        b"accept",
        b"accept-encoding",
        b"accept-language",
        b"traceparent",
        b"tracestate",
        b"x-request-id",
    }
)
_PLAIN: Final = 16 * 1024  # bytes of a body that may travel with others
_NO_HEADERS: Final[Mapping[str, str]] = {}
_REMEMBERED: Final = 512  # heads
_LINGER: Final = 2.0  # seconds in which the rest of a refused body is read, so that its sender reads the answer
_TEXT: Final = re.compile(rb"[ -~]*")


class Head(NamedTuple):
    """What a head of the common form asks for."""

    length: int
    form: Form


class Express:
    """What all connections of one listener share."""

    def __init__(self, parts: ApiParts, hosts: Collection[str] | None) -> None:
        """``hosts`` are the names that a Host may have; None: any (a unix socket)."""
        self.parts = parts
        self._hosts = hosts
        self._heads: dict[bytes, Head | None] = {}
        self._counters: dict[int, Counter] = {}
        self._prefix: dict[int, bytes] = {}
        self._together: list[_Request] = []
        self._date_second = -1
        self._date = b""

    def head(self, raw: bytes) -> Head | None:
        """Judge a head (without its empty line); None: not express. Clients repeat theirs, so it is remembered."""
        try:
            return self._heads[raw]
        except KeyError:
            if len(self._heads) >= _REMEMBERED:
                self._heads.clear()
            found = self._heads[raw] = self._judge(raw)
            return found

    def _judge(self, raw: bytes) -> Head | None:
        first, *lines = raw.split(b"\r\n")
        if first != _REQUEST_LINE:
            return None
        fields: dict[bytes, bytes] = {}
        for line in lines:
            name, colon, value = line.partition(b":")
            name = name.lower()
            if not colon or name not in _KNOWN or name in fields or not _TEXT.fullmatch(value):
                return None
            fields[name] = value.strip(b" ")
        length = fields.get(b"content-length", b"")
        if not length.isdigit() or len(length) > 9 or not 0 < int(length) <= LONGEST:  # noqa: PLR2004  (digits)
            return None
        if fields.get(b"connection", b"keep-alive").lower() != b"keep-alive" or not self._host_ok(fields):
            return None
        kind = fields.get(b"content-type")
        try:
            return Head(int(length), ingest.form_of(None if kind is None else kind.decode()))
        except UnsupportedMedia:
            return None

    def _host_ok(self, fields: Mapping[bytes, bytes]) -> bool:
        value = fields.get(b"host", b"").decode().lower()
        name, colon, port = value.rpartition(":")
        if not colon or not port.isdigit():
            name = value
        return bool(value) and (self._hosts is None or name in self._hosts)

    def submit(self, lane: "Lane", body: bytes, form: Form) -> None:
        """Answer a request, together with those that arrive in the same turn of the loop."""
        self._together.append((lane, body, form))
        if len(self._together) == 1:
            asyncio.get_running_loop().call_soon(self._depart)

    def _depart(self) -> None:
        """Plain single records travel together; every other request has a task of its own."""
        waiting, self._together = self._together, []
        intake = self.parts.intake
        bounds = intake.plain_bounds()
        if bounds is None:
            for lane, body, form in waiting:
                self._start(lane, body, form)
            return
        longest = min(_PLAIN, self.parts.settings().ingest.max_body_bytes)
        perhaps: list[_Request] = []
        for request in waiting:
            _, body, form = request
            if form is Form.JSON and len(body) <= longest:
                perhaps.append(request)
            else:
                self._start(*request)
        plain = intake.plain([body for _, body, _ in perhaps], bounds) if perhaps else None
        if plain is not None:
            self._set_off(perhaps, plain)
            return
        for request in perhaps:
            one = intake.plain((request[1],), bounds) if len(perhaps) > 1 else None
            if one is None:
                self._start(*request)
            else:
                self._set_off((request,), one)

    def _start(self, lane: "Lane", body: bytes, form: Form) -> None:
        lane.task = asyncio.get_running_loop().create_task(self._alone(lane, body, form))

    def _set_off(self, requests: "Sequence[_Request]", plain: Plain) -> None:
        task = asyncio.get_running_loop().create_task(self._convoy(requests, plain))
        for lane, _, _ in requests:
            lane.task = task

    async def _alone(self, lane: "Lane", body: bytes, form: Form) -> None:
        lane.answer(await self.respond(body, form))

    async def _convoy(self, requests: "Sequence[_Request]", plain: Plain) -> None:
        """One append for all: what it meets, all meet. Where an id among them was seen before, each goes alone."""
        try:
            policy = await self.parts.intake.accept_plain(plain)
        except SidecarError as error:
            answers = [self.render(errors.from_error(error)) for _ in requests]
        except Exception as error:  # noqa: BLE001  (the last line of defence: no detail leaves, the type is logged)
            answers = [self.render(errors.from_surprise(error)) for _ in requests]
        else:
            if policy is None:
                await asyncio.gather(*(self._alone(*request) for request in requests))
                return
            accepted, encode = ingest.accepted, msgspec.json.encode
            answers = [
                self._bytes(202, encode(accepted(record.log_id, record.correlation_id, policy)), _NO_HEADERS)
                for record in plain.records
            ]
        for (lane, _, _), answer in zip(requests, answers, strict=True):
            lane.answer(answer)

    async def respond(self, body: bytes, form: Form) -> bytes:
        """Accept a body and return the whole answer's bytes. Raises nothing but cancellation."""
        parts = self.parts
        limit = parts.settings().ingest.max_body_bytes
        if len(body) > limit:
            return self.render(errors.from_error(too_large(limit)))
        try:
            status, payload, headers = await ingest.accept(parts, body, form)
        except SidecarError as error:
            return self.render(errors.from_error(error))
        except Exception as error:  # noqa: BLE001  (the last line of defence: no detail leaves, the type is logged)
            return self.render(errors.from_surprise(error))
        return self._bytes(status, msgspec.json.encode(payload), headers)

    def render(self, response: web.Response, *, last: bool = False) -> bytes:
        """An error's answer, which the general table words as a response object, as bytes; ``last``: then it closes."""
        kept = ("Retry-After", "WWW-Authenticate", "Allow")
        headers = {name: response.headers[name] for name in kept if name in response.headers}
        if last:
            headers["Connection"] = "close"
        return self._bytes(response.status, response.body if isinstance(response.body, bytes) else b"", headers)

    def _bytes(self, status: int, body: bytes, headers: Mapping[str, str]) -> bytes:
        counter = self._counters.get(status)
        if counter is None:
            counter = self._counters[status] = self.parts.metrics.requests.labels("/logs", str(status))
            self._prefix[status] = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nServer: {errors.SERVER}\r\n"
                f"Content-Type: {errors.JSON}\r\nContent-Length: "
            ).encode()
        counter.inc()
        more = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode() if headers else b""
        second = int(time.time())  # RFC 9110, 6.6.1: Date; nothing else reads this clock
        if second != self._date_second:
            self._date_second = second
            self._date = f"\r\nDate: {formatdate(second, usegmt=True)}\r\n".encode()
        return b"".join((self._prefix[status], b"%d" % len(body), self._date, more, b"\r\n", body))


_Request = tuple["Lane", bytes, Form]  # who waits for the answer, the body, what it claims to be


class Lane:
    """One connection's express lane.

    ``feed`` takes what arrives until it returns bytes that are aiohttp's; from then on the lane is not asked again.
    """

    __slots__ = (
        "_answered",
        "_asked",
        "_body_timer",
        "_buffer",
        "_ending",
        "_express",
        "_head",
        "_idle",
        "_linger",
        "_paused",
        "_rest",
        "_taken",
        "_transport",
        "task",
    )

    def __init__(self, express: Express, transport: asyncio.Transport, answered: Callable[[], None]) -> None:
        """``answered`` is called after each answer, with which an idle time begins."""
        self._express = express
        self._transport = transport
        self._answered = answered
        self._buffer = b""
        self._head: Head | None = None  # of the request whose body is being read
        self._body_timer: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None  # refused: what comes is read and thrown away until then
        self._rest = 0  # bytes of a refused body that are to come
        self._taken = 0
        self._paused = False
        self._asked = False
        self._ending = False
        self._idle: asyncio.Future[None] | None = None  # who ends the connection waits for it
        self.task: asyncio.Task[None] | None = None  # kept: the loop alone would let it be collected

    @property
    def busy(self) -> bool:
        """A request is being answered, or its body being read."""
        return self._asked or self._head is not None

    def feed(self, data: bytes) -> bytes | None:
        """Take bytes; returns those that aiohttp must read, the connection being its own from now on."""
        if self._linger is not None:
            self._rest -= len(data)
            if self._rest <= 0:
                self._transport.close()
            return None
        self._buffer = self._buffer + data if self._buffer else data
        if self._asked:
            if not self._paused:
                self._paused = True
                self._transport.pause_reading()
            return None
        return self._next()

    def _next(self) -> bytes | None:
        if self._ending:
            return None
        buffer = self._buffer
        head = self._head
        if head is None:
            if not buffer:
                return None
            end = buffer.find(b"\r\n\r\n", 0, 8192)
            head = None if end < 0 else self._express.head(buffer[:end])
            if head is None:
                self._buffer = b""
                return buffer
            buffer = self._buffer = buffer[end + 4 :]
        if len(buffer) < head.length:
            if self._head is None:
                self._begin_body(head)
            return None
        body, self._buffer = buffer[: head.length], buffer[head.length :]
        self._end_body()
        self._asked = True
        self._express.submit(self, body, head.form)
        return None

    def _begin_body(self, head: Head) -> None:
        """The rest of a body is to come: count it, and give it a time."""
        express = self._express
        try:
            express.parts.budget.take(head.length)
        except SidecarError as error:
            self._refuse(error, head)
            return
        self._head = head
        self._taken = head.length
        loop = asyncio.get_running_loop()
        self._body_timer = loop.call_later(express.parts.settings().listen.body_timeout, self._body_is_late)

    def _end_body(self) -> None:
        self._head = None
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
            self._express.parts.budget.give(self._taken)
            self._taken = 0

    def _refuse(self, error: SidecarError, head: Head) -> None:
        """Answer before the whole body is there, and read on for a while.

        Closing at once would reset the connection of a sender that reads only after its last byte (RFC 9112, section
        9.6), and the answer would be lost with it. Nothing of what is read is kept.
        """
        self._transport.write(self._express.render(errors.from_error(error), last=True))
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._rest = head.length - len(self._buffer)
        self._buffer = b""
        self._linger = asyncio.get_running_loop().call_later(_LINGER, self._transport.close)

    def _body_is_late(self) -> None:
        head = self._head
        self._end_body()
        if head is not None:
            self._refuse(
                BodyTimeout(
                    "the body was not complete in time (listen.body_timeout); send it faster or in smaller parts"
                ),
                head,
            )

    async def end(self, timeout: float | None) -> None:  # noqa: ASYNC109  (bounds the wait, raises nothing)
        """Take no further request, and wait until the one that was taken is answered, or for ``timeout`` seconds."""
        self._ending = True
        if self._asked:
            self._idle = asyncio.get_running_loop().create_future()
            await asyncio.wait((self._idle,), timeout=timeout)

    def _tell_idle(self) -> None:
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def answer(self, answer: bytes) -> None:
        """The answer to what was asked."""
        self._asked = False
        self.task = None
        self._tell_idle()
        if self._transport.is_closing():
            return
        self._transport.write(answer)
        self._answered()

    def go_on(self) -> bytes | None:
        """After an answer: what was pipelined meanwhile; returns as ``feed`` does."""
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        return self._next()

    def close(self) -> None:
        """The connection is gone. What is being committed goes on; its answer has no reader."""
        if self._linger is not None:
            self._linger.cancel()
        self._tell_idle()
        self._end_body()
        self._buffer = b""
