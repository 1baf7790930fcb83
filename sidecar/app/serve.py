"""One sidecar from start to exit.

ORDER OF START, and why: the ops listener first, so that a probe sees "live, not ready" during a long recovery; then the
spool, because nothing can be promised without it; the stores, which do not connect; the phase, which the spool
remembers; the shippers, so that what an earlier run left is under way; the application's listener last: from then on
the sidecar is ready. Only then the configuration is watched.

ORDER OF STOP, the reverse: the watcher; the door (shortly before the deadline, an application may still be writing its
last lines); the shippers, once nothing is pending or the deadline came; the listeners; the stores; the spool. What is
left is on disk, counted, and delivered by the next start.
"""

import asyncio
import logging
import os
import random
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from aiohttp import web
from prometheus_client import CollectorRegistry

from sidecar import jsonlog
from sidecar.api import query
from sidecar.api.body import Budget
from sidecar.api.consistency import Consistency
from sidecar.api.control import Control
from sidecar.api.guard import Guard
from sidecar.api.listener import Listener
from sidecar.api.migration import Migration
from sidecar.api.parts import ApiParts, Found, OpsParts, Readiness
from sidecar.api.server import build_app, build_ops
from sidecar.api.tokens import TokenFile
from sidecar.app import observe
from sidecar.app.adopted import AdoptedTable
from sidecar.app.consistency import ConsistencyService
from sidecar.app.delivery import build_delivery, build_stores, standing
from sidecar.app.evidence import build_evidence
from sidecar.app.parts import FailClosed, PendingIn, ShadowTrouble
from sidecar.app.phase_wiring import Asked, Phased, open_phase
from sidecar.app.phases import InForce
from sidecar.app.signals import Signals, bear_hangups
from sidecar.app.supervise import keep_running
from sidecar.app.warm import warm
from sidecar.clock import Clock, SystemClock
from sidecar.config import Loaded
from sidecar.errors import ConfigError, SpoolFailed
from sidecar.intake import Intake
from sidecar.metrics import Metrics
from sidecar.not_owed import Accounted
from sidecar.overflow import Overflow
from sidecar.phase import STORES
from sidecar.reads import Reads, Shadow
from sidecar.reload import Change, Watcher, subpath_warning
from sidecar.retry import State
from sidecar.screening import Minter
from sidecar.settings import MIB
from sidecar.shipper import Shipper, ShipperStatus
from sidecar.spool import Spool

log = logging.getLogger(__name__)

_GRACE: Final = 1.0  # seconds that answers under way have once the door is closed
_POLL: Final = 0.05  # seconds, while draining
_EXIT_SPOOL_FAILED: Final = 4
_EXIT_DEFECT: Final = 70  # sysexits.h: EX_SOFTWARE
_BODIES: Final = 64 * MIB  # of all request bodies being read together


async def init_stores(loaded: Loaded) -> int:
    """Create what is missing in both stores; prints what was done. Raises StoreError."""
    stores = build_stores(loaded.settings, SystemClock())
    try:
        for name, store in stores.items():
            for line in await store.create() or ("nothing to do",):
                print(f"{name}: {line}")  # noqa: T201  (the answer of a command)
    finally:
        for store in stores.values():
            await store.close()
    return 0


async def serve(loaded: Loaded, *, clock: Clock | None = None) -> int:
    """Run one sidecar until SIGTERM or SIGINT; returns the exit code.

    Raises:
        SpoolLocked, SpoolRefused: the spool cannot be used.
        ConfigError: an address cannot be listened on.
    """
    jsonlog.configure(loaded.settings.logging.level)
    for warning in loaded.warnings:
        log.warning("configuration", extra={"what": warning})
    return await _Sidecar(loaded, clock or SystemClock()).run()


class _Sidecar:
    """Holds the parts between start and stop; decides nothing that a part can decide."""

    def __init__(self, loaded: Loaded, clock: Clock) -> None:
        self._loaded = loaded
        self._settings = loaded.settings
        self._clock = clock
        self._metrics = Metrics(CollectorRegistry())
        self._stores = build_stores(loaded.settings, clock)
        self._shippers: dict[str, Shipper] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stop = asyncio.Event()
        self._failure: SpoolFailed | None = None
        self._defect = False
        self._ready = False
        self._spool: Spool
        self._phased: Phased
        self._phase: InForce
        self._closed: FailClosed
        self._overflow: Overflow
        self._intake: Intake
        self._reads: Reads
        self._consistency: ConsistencyService
        self._shadow: Shadow
        self._watcher: Watcher

    # -- start ---------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Start, serve until told to stop, stop."""
        bear_hangups()
        settings = self._settings
        ops_parts = OpsParts(self._metrics.registry, self._readiness, self._health)
        ops = Listener(build_ops(ops_parts, self._metrics), settings.listen.ops, settings.listen, newest_gets_in=True)
        await ops.start()
        try:
            await self._open_spool()
            try:
                return await self._serve()
            finally:
                await self._spool.close()
        finally:
            await ops.stop(_GRACE)
            for store in self._stores.values():
                await store.close()

    async def _open_spool(self) -> None:
        options = self._settings.spool
        directory = Path(options.directory)
        self._spool = await asyncio.to_thread(Spool.open, directory, options, self._settings.dedup, STORES, self._clock)
        self._spool.on_failure = self._spool_failed
        self._spool.observe_commits(self._metrics.spool_commit_seconds.observe)
        for message in self._spool.recovery.messages:
            log.warning("spool recovered", extra={"what": message})
        observe.observe_spool(self._metrics, self._spool, STORES, self._clock)
        found = [((name,), float(left)) for name, left in self._left().items()]
        self._metrics.observe("undelivered_at_exit", lambda: found)

    async def _serve(self) -> int:
        self._phased = await open_phase(
            self._spool,
            self._stores,
            lambda: self._settings,
            instance=self._instance(),
            metrics=self._metrics,
            clock=self._clock,
            asked=Asked(lambda: self._overflow.open_gaps(), lambda: self._shadow.totals()),  # noqa: PLW0108  (made later)
            evidence=build_evidence(self._stores, self._settings, self._clock),
        )
        self._phase = self._phased.phase
        self._build_delivery()
        self._intake = self._build_intake()
        adopted = AdoptedTable(
            self._stores,
            self._settings.postgres,
            self._intake,
            self._spool,
            policy=lambda: self._phase.policy,
            instance=self._instance(),
            clock=self._clock,
        )
        await adopted.start()
        self._build_reads()
        parts = self._api_parts()
        control = self._build_control(parts)
        self._consistency = ConsistencyService(
            self._stores,
            self._spool,
            lambda: self._settings,
            self._phase,
            metrics=self._metrics,
            instance=self._instance(),
            clock=self._clock,
        )
        consistency = Consistency(self._consistency, control.guard, parts.budget)
        routes = (*query.routes(self._reads), *control.routes(), *self._phase_routes(control), *consistency.routes())
        app = build_app(parts, routes, control.guard)
        listener = Listener(app, self._settings.listen.app, self._settings.listen)
        for name, shipper in self._shippers.items():
            self._spawn(keep_running(name, shipper.run, clock=self._clock, died=self._died))
        await self._phase.start()
        overflow = (("overflow", self._overflow.run), ("gap ledgers", self._overflow.watch))
        for name, part in (*overflow, *self._phase.tasks(), *self._consistency.tasks()):
            self._spawn(keep_running(name, part, clock=self._clock, died=lambda _name: None))
        self._spawn(keep_running("shadow reads", self._shadow.run, clock=self._clock, died=lambda _name: None))
        for name, part in adopted.tasks():
            self._spawn(keep_running(name, part, clock=self._clock, died=lambda _name: None))
        await listener.start()
        try:
            self._watch()
            self._ready = True
            self._spawn(warm([self._stores[name] for name in STORES if name in self._phase.policy.owed]))
            log.info("ready", extra={"phase": self._phase.policy.phase.label, "app": self._settings.listen.app})
            with Signals(self._stop, self._watcher):
                await self._stop.wait()
            await self._drain()
        finally:
            self._ready = False
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await listener.stop(_GRACE)
        return await self._leave()

    def _build_delivery(self) -> None:
        self._delivery = build_delivery(
            self._stores,
            self._spool,
            lambda: self._settings,
            clock=self._clock,
            metrics=self._metrics,
            source=Accounted(self._phased.not_owed),
        )
        self._shippers.update(self._delivery.shippers)
        self._delivery.steering.restore()
        waits, policy = self._phased.not_owed.waits, lambda: self._phase.policy
        self._closed = FailClosed(lambda: self._settings, policy, self._shippers, waits, self._clock)
        self._overflow = Overflow(
            self._spool,
            ledgers={name: store.gap_ledger for name, store in self._stores.items()},
            policy=policy,
            releasable=lambda: self._phase.releasable,
            delivering=lambda name: self._standings()[name].state in (State.UP, State.THROTTLED),
            options=self._settings.spool,
            instance=self._instance(),
            clock=self._clock,
            fleet=self._phase,
        )
        observe.observe_delivery(self._metrics, self._shippers, self._standings)
        observe.observe_pushback(self._metrics, self._spool, self._closed)
        observe.observe_gaps(self._metrics, self._overflow)

    def _build_intake(self) -> Intake:
        intake = Intake(
            spool=self._spool,
            standing=self._phase.standing,
            hold=self._phase.hold,
            settings=lambda: self._settings,
            dedup=self._settings.dedup,
            minter=Minter(self._clock, os.urandom),
            clock=self._clock,
            metrics=self._metrics,
            closed=self._closed,
            make_room=self._overflow.make_room,
        )
        intake.load(self._spool.window())
        return intake

    def _build_reads(self) -> None:
        self._shadow = Shadow(
            self._stores,
            lambda: self._settings,
            lambda: self._phase.policy,
            trouble=ShadowTrouble(lambda: self._settings, self._spool, self._shippers, self._clock),
            owed=PendingIn(self._spool),
            gap=self._overflow.lacks,
            clock=self._clock,
            metrics=self._metrics,
            rng=random.Random(),  # noqa: S311  (sampling, not secrets)
        )
        self._reads = Reads(
            self._stores,
            self._phase.use,
            lambda: self._settings,
            owed=lambda store: self._spool.counters(store).pending,
            clock=self._clock,
            metrics=self._metrics,
            shadow=self._shadow,
        )

    def _build_control(self, parts: ApiParts) -> Control:
        token = TokenFile(lambda: self._settings.control.token_file)
        guard = Guard(token, self._spool.audit, self._clock)
        return Control(self._spool, self._delivery.letters, self._delivery.steering, guard, parts.budget)

    def _phase_routes(self, control: Control) -> Sequence[web.RouteDef]:
        return Migration(self._phased.control, control.guard, control.budget, self._clock.now_us).routes()

    def _api_parts(self) -> ApiParts:
        async def get(log_id: str) -> Found:
            answer = await self._reads.get(log_id)
            return Found(answer.value, answer.served_by, answer.policy.phase.label, answer.consistency, answer.owed)

        return ApiParts(
            intake=self._intake,
            settings=lambda: self._settings,
            metrics=self._metrics,
            status=self._status,
            record_status=self._spool.status,
            get=get,
            read_token=TokenFile(lambda: self._settings.reads.token_file),
            budget=Budget(_BODIES),
        )

    def _watch(self) -> None:
        path = self._loaded.path
        self._watcher = Watcher(path, self._loaded, on_change=self._changed, on_error=self._refused, clock=self._clock)
        warning = subpath_warning(path)
        if warning:
            log.warning("configuration mount", extra={"what": warning})
        watcher = self._watcher
        metrics = self._metrics
        metrics.observe("config_last_reload_successful", lambda: [((), float(watcher.last_successful))])
        metrics.observe("config_last_reload_success_timestamp_seconds", lambda: [((), watcher.last_success_us / 1e6)])
        metrics.observe("config_info", lambda: [((watcher.current.digest,), 1.0)])
        self._spawn(keep_running("reload", watcher.run, clock=self._clock, died=self._reload_died))

    def _spawn(self, what: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.get_running_loop().create_task(what)
        task.add_done_callback(self._task_ended)
        self._tasks.append(task)

    def _task_ended(self, task: "asyncio.Task[None]") -> None:
        """Parts end only with the spool; anything else is a defect, which must not stay silent: stop in order."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.error("task ended", extra={"task": task.get_name()}, exc_info=error)
        self._defect = True
        self._stop.set()

    # -- events --------------------------------------------------------------------------------------------------

    def _died(self, name: str) -> None:
        self._metrics.shipper_restarts.labels(name).inc()

    def _reload_died(self, _: str) -> None:
        """A defect met while a file was looked at: what is in force stays in force, and it shows."""
        self._watcher.last_successful = False
        self._metrics.config_reload_failures.inc()

    def _spool_failed(self, error: SpoolFailed) -> None:
        log.critical("the spool failed; stopping, the next start recovers", extra={"what": str(error)})
        self._failure = error
        self._ready = False
        self._stop.set()

    async def _changed(self, change: Change) -> None:
        self._settings = change.loaded.settings
        logging.getLogger().setLevel(self._settings.logging.level.upper())
        log.info(
            "configuration changed",
            extra={"changed": ",".join(change.changed), "restart_required": ",".join(change.restart_required)},
        )
        for shipper in self._shippers.values():
            shipper.wake()
        await self._phase.configured()

    def _refused(self, error: ConfigError) -> None:
        self._metrics.config_reload_failures.inc()
        log.error("configuration refused; the last good one stays in force", extra={"what": str(error)})

    # -- what others ask -----------------------------------------------------------------------------------------

    def _readiness(self) -> Readiness:
        if self._failure is not None:
            return Readiness(ready=False, reasons=(f"the spool failed: {self._failure}",))
        return Readiness(ready=self._ready, reasons=() if self._ready else ("starting or stopping",))

    def _instance(self) -> str:
        return self._settings.instance or os.environ.get("HOSTNAME") or socket.gethostname()

    def _standings(self) -> dict[str, ShipperStatus]:
        """What delivery to each store is doing."""
        waits = self._phased.not_owed.waits
        return {name: standing(self._shippers[name], waits.get(name), self._clock) for name in STORES}

    def _health(self) -> Mapping[str, object]:
        if not self._ready:
            return {"ready": False, "reasons": self._readiness().reasons}
        return {
            "ready": True,
            "phase": self._phase.policy.phase.label,
            "stores": {name: status.state.value for name, status in self._standings().items()},
            "pending": {name: self._spool.counters(name).pending for name in STORES},
            "accepting": self._spool.state().accepting,
        }

    def _status(self) -> Mapping[str, object]:
        watcher = self._watcher
        return {
            "instance": self._instance(),
            "phase": {**self._phase.status(), "gap_ledger_trouble": self._phased.not_owed.trouble},
            "stores": observe.delivery_status(self._spool, self._standings(), self._clock),
            "orders": self._delivery.steering.status(),
            "spool": observe.spool_status(self._spool),
            "gaps": observe.gaps_status(self._overflow),
            "shadow_reads": self._shadow.status(),
            "configuration": {
                "path": self._loaded.path,
                "sha256": watcher.current.digest,
                "last_reload_successful": watcher.last_successful,
                "restart_required": watcher.restart_required,
            },
        }

    # -- stop ----------------------------------------------------------------------------------------------------

    def _left(self) -> dict[str, int]:
        """Records acknowledged and not delivered: by store, and those that a fenced instance could not decide."""
        left = {name: self._spool.counters(name).pending for name in STORES}
        return left | {"undecided": self._spool.ledger.unresolved_records}

    def _pending(self) -> int:
        return sum(self._left().values())

    async def _drain(self) -> None:
        """Go on accepting until shortly before the deadline, deliver what can be delivered (semantics, section 5)."""
        drain = self._settings.drain
        deadline = self._clock.monotonic() + drain.timeout
        log.info("stopping", extra={"pending": self._pending(), "seconds": drain.timeout})
        closing = deadline - min(drain.stop_accepting_before, drain.timeout)
        quiet_since: float | None = None
        while self._failure is None and (now := self._clock.monotonic()) < deadline:
            if now >= closing:
                self._intake.stop()
            if self._pending():
                quiet_since = None
            else:
                quiet_since = now if quiet_since is None else quiet_since
                if now - quiet_since >= min(1.0, drain.stop_accepting_before):
                    break
            await self._clock.sleep(_POLL)
        self._intake.stop()
        self._intake.end_waits()

    async def _leave(self) -> int:
        """The last line: what is left, by store."""
        if self._failure is not None:
            return _EXIT_SPOOL_FAILED
        await self._phase.leave()
        await self._consistency.leave()
        log.info("stopped", extra={f"undelivered_{name}": n for name, n in self._left().items()})
        return _EXIT_DEFECT if self._defect else 0
