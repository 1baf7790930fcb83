"""Realistic records of about 600 bytes and the request bodies made of them, ready to be sent."""

import itertools
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Format = Literal["json", "ndjson"]
Ids = Literal["minted", "client"]

SERVICES = ("credit-bureau", "income-verification", "fraud-screening", "document-store", "core-banking")
PATHS = ("/v2/reports", "/v1/employers/verify", "/v3/score", "/v1/documents", "/v1/accounts/balance")
TYPES = ("INFO", "REQUEST", "RESPONSE", "ERROR")
SLOT = "\x00"  # where a client-supplied id goes; never occurs in the records


def record(seed: int) -> dict[str, Any]:
    """One integration log without id: request and response of a partner's interface, 3 % failures.

    Payloads are JSON kept as text, as .NET clients send them; every fourth is a JSON value.
    """
    rng = random.Random(seed)
    which = rng.randrange(len(SERVICES))
    failed = rng.random() < 0.03
    request: Any = {
        "path": PATHS[which],
        "applicant": {"ref": f"{rng.getrandbits(64):016x}", "country": rng.choice(("DE", "FR", "NL", "PL"))},
        "amount": round(rng.uniform(500, 90_000), 2),
        "products": rng.sample(("mortgage", "car", "consumer", "card", "overdraft"), 2),
        "traceId": f"{rng.getrandbits(128):032x}",
    }
    response: Any = {
        "status": "REJECTED" if failed else "ACCEPTED",
        "score": rng.randrange(300, 850),
        "reasons": rng.sample(("income", "history", "limits", "address", "age"), 2),
        "validUntil": "2027-01-31",
    }
    if seed % 4:
        request, response = json.dumps(request), json.dumps(response)
    return {
        "application_id": rng.randrange(1, 200_000),
        "log_type": "ERROR" if failed else TYPES[rng.randrange(3)],
        "service_name": SERVICES[which],
        "request_data": request,
        "response_data": response,
        "status_code": 502 if failed else 200,
        "is_success": not failed,
        "error_message": "upstream closed the connection before the answer was complete" if failed else None,
        "processing_time_ms": rng.randrange(3, 4_000),
        "correlation_id": f"{rng.getrandbits(128):032x}",
        "user_id": f"user-{rng.randrange(1, 5_000)}",
    }


def _text(seed: int, ids: Ids) -> str:
    document = record(seed)
    if ids == "client":
        document = {"log_id": SLOT} | document
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False)


def uuid7s(stream: int) -> Iterator[str]:
    """UUIDv7 texts, unique per ``stream`` (0..4095) and process start; cheaper than ``uuid.UUID``."""
    tail = (time.time_ns() & 0xFF) << 40
    for n in itertools.count():
        ms = time.time_ns() // 1_000_000
        low = (tail + n) & 0xFFFF_FFFF_FFFF
        yield f"{ms >> 16:08x}-{ms & 0xFFFF:04x}-7{stream & 0xFFF:03x}-8000-{low:012x}"


@dataclass(frozen=True)
class Shape:
    """What one POST looks like."""

    per_post: int = 1
    format: Format = "json"
    ids: Ids = "minted"
    path: str = "/logs"

    @property
    def distinct(self) -> int:
        """How many different bodies are prepared: about 20,000 different records, at most 2,000 bodies."""
        return max(8, min(2_000, 20_000 // self.per_post))


def _join(texts: list[str], shape: Shape) -> str:
    if shape.format == "ndjson":
        return "\n".join(texts) + "\n"
    return texts[0] if shape.per_post == 1 else "[" + ",".join(texts) + "]"


def requests(shape: Shape, host: str, stream: int = 0) -> Iterator[bytes]:
    """Whole HTTP/1.1 requests, without end. Bodies repeat (but for client-supplied ids, which never do)."""
    kind = "application/x-ndjson" if shape.format == "ndjson" else "application/json"
    head = f"POST {shape.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: %d\r\n\r\n"
    bodies = []
    for which in range(shape.distinct):
        first = which * shape.per_post
        bodies.append(_join([_text(first + k, shape.ids) for k in range(shape.per_post)], shape))
    if shape.ids == "minted":
        ready = [(head % len(raw)).encode() + raw for raw in (body.encode() for body in bodies)]
        return itertools.cycle(ready)
    slot = json.dumps(SLOT)
    split = [body.split(slot) for body in bodies]
    return _with_ids(split, head, uuid7s(stream))


def _with_ids(split: list[list[str]], head: str, ids: Iterator[str]) -> Iterator[bytes]:
    for pieces in itertools.cycle(split):
        parts = [pieces[0]]
        for piece in pieces[1:]:
            parts += ('"', next(ids), '"', piece)
        body = "".join(parts).encode()
        yield (head % len(body)).encode() + body
