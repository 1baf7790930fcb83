"""``sidecar drain``: delivers an orphaned spool until it is empty, with the shippers that ``serve`` uses.

For a volume, or a copy of a directory, whose pod is gone. It takes the spool's lock, recovers what an unclean stop left
as any start does, accepts nothing, and delivers what is owed by what was stamped at accept: the configuration's phase
plays no part. Orders (pause, rate) that the spool remembers were about the pod: they are named and not obeyed.

Records that were accepted for one store alone are in the gap ledger before they are delivered, as with ``serve``: under
the name that the pod counted by, in the ledger of the store that they go to.

``undecided`` records (of an instance that was fenced) are owed to nobody yet; ``--phase`` decides it, once.

It ends with 0 when nothing is pending and no store has a dead letter; then the directory may be deleted. It ends with 1
when dead letters, undecided records or, after ``--timeout`` or SIGTERM, pending ones are left: named, on disk, and
there for the next try.
"""

import argparse
import asyncio
import os
import signal
import socket
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Final

import msgspec
from prometheus_client import CollectorRegistry

from sidecar import jsonlog
from sidecar.app.delivery import Delivery, build_delivery, build_stores, standing
from sidecar.app.phases import Steady
from sidecar.app.supervise import keep_running
from sidecar.clock import Clock, SystemClock
from sidecar.config import load
from sidecar.errors import SpoolFailed
from sidecar.metrics import Metrics
from sidecar.not_owed import Accounted, NotOwed
from sidecar.obligations import Obligations
from sidecar.operator.access import require_spool
from sidecar.operator.progress import Progress
from sidecar.phase import STORES, TABLE, Phase, parse_phase
from sidecar.retry import State
from sidecar.settings import Settings
from sidecar.spool import Obligation, Spool

_POLL: Final = 0.05  # seconds
_EXIT_LEFT: Final = 1
_INTERRUPTED: Final = 130
_ANY: Final = TABLE[Phase.DUAL_WRITE]  # a drain knows no phase: one in which gaps may be closed, so lines are exact


async def drain(args: argparse.Namespace) -> int:
    """Deliver everything in ``--spool``; the exit code.

    Raises:
        ConfigError: the configuration cannot be read.
        SpoolLocked: another process holds the spool.
        SpoolRefused: there is none, or it cannot be used.
        SpoolFailed: the disk failed.
    """
    loaded = load(args.config, os.environ)
    directory = Path(args.spool)
    require_spool(directory)
    options = msgspec.structs.replace(loaded.settings.spool, directory=str(directory))
    settings = msgspec.structs.replace(loaded.settings, spool=options)
    jsonlog.configure("error" if sys.stderr.isatty() else settings.logging.level)
    phase = None if args.phase is None else TABLE[parse_phase(args.phase, "--phase")]
    clock = SystemClock()
    opening = asyncio.to_thread(Spool.open, directory, options, settings.dedup, STORES, clock)
    spool = await opening
    try:
        for message in spool.recovery.messages:
            _say(message)
        if phase is not None:
            best_effort = frozenset[str](phase.owed - phase.required)
            await spool.resolve(Obligation(int(phase.phase), frozenset[str](phase.required), best_effort))
        return await _Drain(spool, settings, clock).run(args.timeout)
    finally:
        await spool.close()


class _Drain:
    def __init__(self, spool: Spool, settings: Settings, clock: Clock) -> None:
        self._spool = spool
        self._clock = clock
        self._stores = build_stores(settings, clock)
        self._metrics = Metrics(CollectorRegistry())
        self._not_owed = NotOwed(
            spool,
            ledgers={name: store.gap_ledger for name, store in self._stores.items()},
            uses=lambda: nullcontext(Steady(_ANY)),
            undecided=Obligations(spool).undecided,
            instance=settings.instance or socket.gethostname(),
            clock=clock,
            deciding=lambda _policy: (),
        )
        self._delivery: Delivery = build_delivery(
            self._stores, spool, lambda: settings, clock=clock, metrics=self._metrics, source=Accounted(self._not_owed)
        )
        self._progress = Progress("delivered")
        self._stopped: int | None = None
        self._failure: SpoolFailed | None = None
        spool.on_failure = self._failed

    def _failed(self, error: SpoolFailed) -> None:
        self._failure = error

    async def run(self, seconds: float | None) -> int:
        for name, orders in self._delivery.steering.status().items():
            if orders:
                _say(f"{name}: an operator's order of the pod is not obeyed here: {orders}")
        loop = asyncio.get_running_loop()
        for number, code in ((signal.SIGTERM, _EXIT_LEFT), (signal.SIGINT, _INTERRUPTED)):
            loop.add_signal_handler(number, self._stop, code)
        tasks = [
            loop.create_task(keep_running(name, shipper.run, clock=self._clock, died=lambda _name: None))
            for name, shipper in self._delivery.shippers.items()
        ]
        try:
            await self._until_empty(seconds)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for store in self._stores.values():
                await store.close()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            self._progress.close()
        if self._failure is not None:
            raise self._failure
        return self._verdict()

    def _stop(self, code: int) -> None:
        self._stopped = code

    def _pending(self) -> int:
        return sum(self._spool.counters(name).pending for name in STORES)

    async def _until_empty(self, seconds: float | None) -> None:
        end = None if seconds is None else self._clock.monotonic() + seconds
        start = self._pending()
        while (left := self._pending()) and self._stopped is None and self._failure is None:
            self._progress.show(start - left, left, self._trouble())
            if end is not None and self._clock.monotonic() >= end:
                self._stopped = _EXIT_LEFT
            await self._clock.sleep(_POLL)

    def _trouble(self) -> str:
        waits = self._not_owed.waits
        found = {name: standing(self._delivery.shippers[name], waits.get(name), self._clock) for name in STORES}
        return "; ".join(
            f"{name} {status.state} ({status.reason})"
            for name, status in found.items()
            if status.state is not State.UP and self._spool.counters(name).pending
        )

    def _verdict(self) -> int:
        """What is left, one line each; the exit code."""
        left = False
        for name in STORES:
            account = self._spool.counters(name)
            _say(f"{name}: {account.delivered} delivered, {account.pending} pending, {account.dead_lettered} dead")
            if account.pending:
                left = True
            if account.dead_lettered:
                left = True
                _say(f"{name}: {account.dead_lettered} dead letters: sidecar dead-letter export|redrive|discard")
        undecided = self._spool.ledger.unresolved_records
        if undecided:
            left = True
            _say(f"{undecided} records are owed to be decided: say --phase")
        if self._stopped == _INTERRUPTED:
            return _INTERRUPTED
        return _EXIT_LEFT if left else 0


def _say(text: str) -> None:
    sys.stderr.write(f"sidecar drain: {text}\n")
    sys.stderr.flush()
