"""An independent client: it writes down what it sends and, fsynced, every answer that it got, and judges by that alone.

A power cut asks for a strict reading: only what the client had read *before* the cut was promised. ``History.counting``
says whether answers count; the driver clears it in the tick in which it breaks the disk.
"""

import asyncio
import io
import json
import os
import random
import uuid
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from tests.faults.rows import Row
from tests.parts import oracle
from tests.parts.sidecar import eventually

_JSON = {"Content-Type": "application/json"}


class History:
    """Sent ids with the hash of their content; acknowledged ids with the phase that the answer named."""

    def __init__(self, path: Path) -> None:
        self.sent: dict[str, str] = {}
        self.acked: dict[str, str] = {}
        self.statuses: Counter[int] = Counter()
        self.broken = 0  # requests that ended without an answer
        self.counting = True
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def sends(self, records: list[dict[str, Any]]) -> None:
        """Before the request."""
        hashes = {record["log_id"]: oracle.content(record) for record in records}
        self.sent.update(hashes)
        self._line({"sent": hashes})

    async def answered(self, status: int, document: dict[str, Any]) -> None:
        """After the answer was read; durable when this returns.

        Flushed beside the loop: in it live the proxies that play the stores, and a busy disk takes its time. What was
        read while nothing counted never counts, however late its flush.
        """
        counted = self.counting
        self.statuses[status] += 1
        ids = [i for i in document.get("log_ids", [document.get("log_id")]) if i] if status < 300 else []
        self._line({"status": status, "phase": document.get("phase"), "acked": ids, "counts": counted})
        await asyncio.to_thread(os.fsync, self._fd)
        if counted and self.counting:
            self.acked.update(dict.fromkeys(ids, document.get("phase", "")))

    def unanswered(self, why: str) -> None:
        """The connection broke first: the records may be there or not."""
        self.broken += 1
        self._line({"unanswered": why})

    def _line(self, what: dict[str, Any]) -> None:
        os.write(self._fd, (json.dumps(what) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def make(rng: random.Random, n: int, size: int, **fields: Any) -> dict[str, Any]:
    """A whole record, in the words in which a store gives it back."""
    return {
        "log_id": str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        "application_id": n,
        "log_type": rng.choice(("INFO", "ERROR", "AUDIT")),
        "service_name": f"service-{n % 5}",
        "request_data": rng.choice((None, "", '{"b":1.10, "a":[1,2 ]}', "é😀\r\n")),
        "response_data": "x" * rng.randrange(size),
        "status_code": rng.choice((None, 200, 500)),
        "is_success": rng.random() < 0.9,
        "error_message": rng.choice((None, "", "no")),
        "processing_time_ms": rng.choice((None, 0, n)),
        "log_timestamp": f"2026-01-{1 + n % 28:02d}T00:00:00.{rng.randrange(1_000_000):06d}Z",
        "correlation_id": f"c-{n}",
        "user_id": None,
        **fields,
    }


class Client:
    """Several workers that post batches until the block ends; whatever the sidecar does, they go on."""

    def __init__(
        self,
        row: Row,
        url: str,
        *,
        workers: int = 4,
        batch: int = 5,
        size: int = 400,
        pause: float = 0.0,
        patience: float = 10.0,
        socket: str | None = None,
    ) -> None:
        self.history = History(row.history)
        self.url = url
        self._rng = random.Random(row.rng.random())
        self._workers = workers
        self._batch = batch
        self._size = size
        self._pause = pause
        self._patience = aiohttp.ClientTimeout(total=patience)
        self._socket = socket
        self._n = 0
        self._going = True
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self.go()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop(0.0 if error else 20.0)
        await asyncio.sleep(0.05)  # for transports to close: a session's end does not wait for them
        self.history.close()

    def go(self) -> None:
        """Send, until :meth:`stop`."""
        self._going = True
        self._tasks = [asyncio.create_task(self._work()) for _ in range(self._workers)]

    async def stop(self, seconds: float = 20.0) -> None:
        """Send nothing more; what is under way has so long to end, so that nothing is accepted behind our back."""
        self._going = False
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def acked(self, more: int, seconds: float = 30.0) -> None:
        """Wait until so many more records are acknowledged."""
        wanted = len(self.history.acked) + more
        await eventually(lambda: len(self.history.acked) >= wanted, seconds=seconds, what=f"{more} more acknowledged")

    async def send(self, session: aiohttp.ClientSession, records: list[dict[str, Any]]) -> int | None:
        """One request; its status, None where the connection broke."""
        self.history.sends(records)
        try:
            body = io.BytesIO(json.dumps(records).encode())  # aiohttp warns of large bodies that are plain bytes
            async with session.post(f"{self.url}/logs", data=body, headers=_JSON) as answer:
                document = json.loads(await answer.text())
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self.history.unanswered(repr(error))
            return None
        await self.history.answered(answer.status, document)
        return answer.status

    def session(self) -> aiohttp.ClientSession:
        """A session that reaches the sidecar."""
        connector = aiohttp.UnixConnector(self._socket) if self._socket else None
        return aiohttp.ClientSession(connector=connector, timeout=self._patience)

    def records(self, count: int, **fields: Any) -> list[dict[str, Any]]:
        """Fresh records."""
        self._n += count
        return [make(self._rng, self._n - i, self._size, **fields) for i in range(count)]

    async def _work(self) -> None:
        async with self.session() as session:
            while self._going:
                status = await self.send(session, self.records(self._batch))
                if status != 202:
                    await asyncio.sleep(0.02)
                elif self._pause:
                    await asyncio.sleep(self._pause)
