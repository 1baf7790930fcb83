"""The account of semantics 6, looked at from outside at every scrape while something else happens."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from tests.parts.sidecar import Sidecar

PARTS = ("delivered_total", "released_total", "discarded_total", "quarantined_total")


@dataclass
class Scrapes:
    """How many accounts were looked at, and the last scrape."""

    seen: int = 0


def adds_up(metrics: dict[str, float]) -> int:
    """Owed = delivered + pending + dead + released + discarded + quarantined, per store; how many were there."""
    seen = 0
    for store in ("postgres", "dynamodb"):
        key = f'{{store="{store}"}}'
        if f"sidecar_store_records_owed_total{key}" not in metrics:
            continue
        total = metrics[f"sidecar_store_pending_records{key}"]
        total += sum(metrics[f"sidecar_store_records_{part}{key}"] for part in PARTS)
        total += sum(
            value
            for name, value in metrics.items()
            if name.startswith("sidecar_dead_letter_records{") and f'store="{store}"' in name
        )
        assert metrics[f"sidecar_store_records_owed_total{key}"] == total, store
        seen += 1
    return seen


@asynccontextmanager
async def watching(sidecar: Sidecar) -> AsyncIterator[Scrapes]:
    """Scrape, at most fifty times a second, until the block ends; fails where one account does not add up."""
    scrapes = Scrapes()

    async def scrape() -> None:
        while True:
            try:
                scrapes.seen += adds_up(await sidecar.metrics())
            except (aiohttp.ClientError, OSError):  # being restarted
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.02)

    task = asyncio.create_task(scrape())
    try:
        yield scrapes
    finally:
        task.cancel()
        await asyncio.wait((task,))
        if not task.cancelled():
            task.result()
