"""The bounded decoder alone: the shared budget, and any cut of any stream."""

import asyncio
import contextlib
import gzip
import zlib
from types import SimpleNamespace
from typing import Any, cast

import hypothesis.strategies as st
import pytest
from aiohttp import StreamReader, web
from aiohttp.base_protocol import BaseProtocol
from hypothesis import given, settings
from multidict import CIMultiDict

from sidecar.api.body import Budget, read_body
from sidecar.errors import Busy, MalformedBody, TooLarge

LIMIT = 1 << 20


def request(*parts: bytes, end: bool = True) -> web.BaseRequest:
    """As much of a request as the decoder looks at, on a real stream reader."""
    loop = asyncio.get_running_loop()
    protocol = BaseProtocol(loop)
    protocol.connection_made(asyncio.Transport())
    reader = StreamReader(protocol, 1 << 24, loop=loop)
    feed = iter(parts)

    def step() -> None:
        part = next(feed, None)
        if part is not None:
            reader.feed_data(part)
            loop.call_soon(step)
        elif end:
            reader.feed_eof()

    loop.call_soon(step)
    fake = SimpleNamespace(content=reader, content_length=None, headers=CIMultiDict[str]())
    return cast("web.BaseRequest", fake)


async def decode(
    data: bytes, coding: str, *, step: int = 1 << 16, limit: int = LIMIT, budget: Budget | None = None
) -> bytes:
    """Decode a body that arrives in parts."""
    parts = [data[i : i + step] for i in range(0, len(data), step)]
    return await read_body(request(*parts), coding, limit=limit, patience=10, budget=budget or Budget(1 << 30))


def _pack(data: bytes, coding: str) -> bytes:
    if coding == "gzip":
        return gzip.compress(data)
    if coding == "deflate":
        return zlib.compress(data)
    raw = zlib.compressobj(wbits=-15)
    return raw.compress(data) + raw.flush()


_codings = st.sampled_from(["gzip", "deflate", "raw"])


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=3000), _codings, st.integers(1, 40))
def test_whole_streams_come_through(data: bytes, coding: str, step: int) -> None:
    """In parts of any size."""
    assert asyncio.run(decode(_pack(data, coding), coding.replace("raw", "deflate"), step=step)) == data


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), _codings, st.integers(1, 40), st.data())
def test_no_cut_stream_comes_through(data: bytes, coding: str, step: int, draw: Any) -> None:
    """Cut anywhere, a stream is malformed: never its beginning alone."""
    packed = _pack(data, coding)
    cut = packed[: draw.draw(st.integers(0, len(packed) - 1))]
    with pytest.raises(MalformedBody):
        asyncio.run(decode(cut, coding.replace("raw", "deflate"), step=step))


@settings(max_examples=150, deadline=None)
@given(st.binary(min_size=1, max_size=300), st.data())
def test_a_flipped_bit_never_changes_what_comes_through(data: bytes, draw: Any) -> None:
    """Checksum and size of gzip hold: a damaged stream is refused, or only its header's irrelevant fields changed."""
    packed = bytearray(gzip.compress(data))
    place = draw.draw(st.integers(0, len(packed) * 8 - 1))
    packed[place // 8] ^= 1 << place % 8
    with contextlib.suppress(MalformedBody):
        assert asyncio.run(decode(bytes(packed), "gzip")) == data


@pytest.mark.parametrize("size", [LIMIT, LIMIT + 1])
@pytest.mark.parametrize("coding", ["", "gzip", "deflate"])
async def test_the_bound_is_exact(size: int, coding: str) -> None:
    """Exactly the bound passes, one byte more does not, plain or inflated."""
    body = b"x" * size
    data = body if not coding else _pack(body, coding)
    if size == LIMIT:
        assert await decode(data, coding) == body
    else:
        with pytest.raises(TooLarge):
            await decode(data, coding)


async def test_a_bomb_is_not_inflated_beyond_the_bound() -> None:
    """What is held never passes the bound, whatever the stream would give."""
    held = 0

    class Watching(Budget):
        def take(self, size: int) -> None:
            nonlocal held
            super().take(size)
            held += size

    with pytest.raises(TooLarge):
        await decode(gzip.compress(b"\0" * (64 << 20)), "gzip", budget=Watching(1 << 30))
    assert held <= LIMIT


async def test_bodies_share_a_budget() -> None:
    """Large bodies beyond it are Busy; small ones pass always; what is taken is given back, also after a failure."""
    budget = Budget(3 << 19)
    slow = [
        asyncio.create_task(
            read_body(request(b"x" * (1 << 20), end=False), "", limit=LIMIT, patience=0.3, budget=budget)
        )
    ]
    while not (budget._used or slow[0].done()):
        await asyncio.sleep(0)
    with pytest.raises(Busy) as caught:
        await decode(b"y" * (1 << 20), "", budget=budget)
    assert caught.value.reason == "memory"
    assert await decode(b"z" * 60_000, "", budget=budget) == b"z" * 60_000
    with pytest.raises(MalformedBody):
        await slow[0]
    assert budget._used == 0
    assert len(await decode(b"y" * (1 << 20), "", budget=budget)) == 1 << 20
