"""Live traffic for ``sidecar demo``: an application that logs without pause and remembers what was acknowledged."""

import asyncio
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from sidecar.phase import TABLE, StoreName, parse_phase

_BATCH: Final = 10
_EVERY: Final = 0.05  # seconds between two batches: about 200 records/s
_SERVICES: Final = ("CreditCheckService", "PaymentService", "LoanService", "KycService")


@dataclass(slots=True)
class Traffic:
    """``run`` until ``stop``. ``acked``: log_id -> phase in the 202."""

    url: str
    client: aiohttp.ClientSession
    acked: dict[str, str] = field(default_factory=dict)
    pushed_back: int = 0  # 503s: nothing was stored, the same batch was sent again
    other: dict[int, int] = field(default_factory=dict)  # any other status: there must be none
    _n: int = 0
    _stopping: bool = False

    async def run(self) -> None:
        """Post batch after batch; ends when the last one is answered."""
        while not self._stopping:
            batch = [self._record() for _ in range(_BATCH)]
            stored = False
            while not stored:
                stored = await self._post(batch)
                await asyncio.sleep(_EVERY)

    def stop(self) -> None:
        """Let ``run`` end."""
        self._stopping = True

    def _record(self) -> dict[str, Any]:
        self._n += 1
        return {
            "service_name": _SERVICES[self._n % len(_SERVICES)],
            "application_id": self._n,
            "request_data": {"amount": 100 + self._n % 900, "currency": "EUR"},
            "status_code": 200 if self._n % 20 else 500,
            "is_success": bool(self._n % 20),
            "processing_time_ms": self._n % 250,
            "correlation_id": f"demo-{self._n}",
        }

    async def _post(self, batch: list[dict[str, Any]]) -> bool:
        async with self.client.post(f"{self.url}/logs", json=batch) as answer:
            document = await answer.json(content_type=None)
        if answer.status in (201, 202):
            self.acked.update(dict.fromkeys(document["log_ids"], document["phase"]))
            return True
        if answer.status == 503:  # noqa: PLR2004  (the one answer that means: send again)
            self.pushed_back += 1
            return False
        self.other[answer.status] = self.other.get(answer.status, 0) + 1
        return True

    async def post_one(self, record: dict[str, Any]) -> str:
        """One record by hand; its log_id."""
        async with self.client.post(f"{self.url}/logs", json=record) as answer:
            document = await answer.json(content_type=None)
        self.acked[document["log_id"]] = document["phase"]
        return str(document["log_id"])

    def owed_to(self, store: StoreName) -> set[str]:
        """The ids that this store must have, by the phase that each was acknowledged in."""
        return {log_id for log_id, phase in self.acked.items() if store in TABLE[parse_phase(phase)].owed}
