"""How the comparison of the two stores is put together: for a sidecar, and for the commands that compare alone."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar, cast

from sidecar.api.consistency import Asked, Wanted
from sidecar.app.parts import LedgeredStore, named_apart, spool_name
from sidecar.app.phases import InForce
from sidecar.clock import Clock
from sidecar.consistency import (
    FIRST_US,
    Fleet,
    Known,
    Mirrored,
    Options,
    OwnSpool,
    Rules,
    Together,
    Validator,
    Whereabouts,
    document,
    fates_of_spool,
)
from sidecar.consistency.evidence import Validations
from sidecar.consistency.late import LateWrites
from sidecar.consistency.mirror import Mirror
from sidecar.consistency.repair import Repair
from sidecar.consistency.tail import Tail
from sidecar.errors import BadRequest, Busy, StoreError
from sidecar.fleet.census import Census, Presence, current
from sidecar.fleet_tables import Heartbeat
from sidecar.gaps import GapLine
from sidecar.metrics import Metrics
from sidecar.phase import DYNAMODB, POSTGRES, STORES, StoreName
from sidecar.record import timestamp_text
from sidecar.settings import Settings, Validation
from sidecar.spool import Spool, view
from sidecar.stores.dynamodb import DynamoDBStore
from sidecar.verdicts import DAY_US, RunLine, ValidationLedger

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_CLOCKS_US: Final = 3_600_000_000  # what is due to expire within the hour is not called missing, nor inserted
_LEASE: Final = "validation"
_SHOWN: Final = 10  # runs in an answer
_LOOKED_AT: Final = 5  # runs that the metrics look at
_FAREWELL: Final = 4.0  # seconds, at the end of the process
_REFRESH: Final = 60.0  # seconds between two looks at them


def home_of(stores: Mapping[StoreName, object]) -> DynamoDBStore:
    """The store that keeps the verdicts."""
    return cast("DynamoDBStore", stores[DYNAMODB])


def kept_from(settings: Settings, clock: Clock, store: StoreName) -> int:
    """The log_timestamp below which a store keeps no record, with a margin for clocks."""
    days = settings.dynamodb.ttl_days if store == DYNAMODB else settings.validation.postgres_retention_days
    return FIRST_US if days is None else clock.now_us() - days * DAY_US + _CLOCKS_US


def build_validator(
    stores: Mapping[StoreName, LedgeredStore],
    whereabouts: Whereabouts,
    settings: Callable[[], Settings],
    *,
    clock: Clock,
) -> Validator:
    """A validator over these stores; ``settings`` is asked at each run."""

    def rules() -> Rules:
        kept = {store: partial(kept_from, settings(), clock, store) for store in STORES}
        return Rules(settle=settings().validation.settle, young=settings().phases.max_lag, kept_from_us=kept)

    async def gaps() -> Sequence[GapLine]:
        return [line for store in stores.values() for line in await store.gap_ledger.gaps()]

    return Validator(
        stores,
        whereabouts,
        gaps,
        home_of(stores).verdicts,
        rules=rules,
        clock=clock,
        new_id=lambda: secrets.token_hex(6),
    )


def build_repair(
    stores: Mapping[StoreName, LedgeredStore], settings: Settings, *, clock: Clock, dry_run: bool, overwrite: bool
) -> Repair:
    """One repair."""
    return Repair(
        stores,
        home_of(stores).replace,
        partial(kept_from, settings, clock),
        home_of(stores).verdicts,
        clock=clock,
        dry_run=dry_run,
        overwrite=overwrite,
    )


def ask_others(
    stores: Mapping[StoreName, LedgeredStore],
    settings: Settings,
    own: tuple[str, Callable[[], str | None]] | None,
    clock: Clock,
) -> Whereabouts:
    """The fleet's tables: what became of refused records, and, in a fleet, what the other sidecars hold.

    ``own`` are this one's instance and the name of its spool, which is asked better directly; another process of the
    same instance, with another spool, is one of the others. None: a command that has just begun to look.
    """
    census = Census()
    tables = {name: store.fleet for name, store in stores.items()}

    async def heartbeats() -> tuple[Sequence[Heartbeat], Sequence[str]]:
        asked = clock.monotonic()
        rows = {name: await table.heartbeats() for name, table in tables.items()}
        members = census.observe(rows, asked_at=asked, answered_at=clock.monotonic())
        others = [m for m in current(members) if m.counts and not is_own(m.heartbeat)]
        silent = [m.heartbeat.instance for m in others if m.presence is Presence.SILENT]
        return [m.heartbeat for m in others], silent

    def is_own(row: Heartbeat) -> bool:
        return own is not None and row.instance == own[0] and row.spool in ("", own[1]())

    home = home_of(stores).fleet
    if not settings.fleet.enabled:
        return Mirrored(home.fates)
    return Fleet(heartbeats, home.fates, clock=clock, poll=min(1.0, settings.fleet.heartbeat / 2), newcomer=own is None)


@dataclass(slots=True)
class _Last:
    """What the metrics say."""

    reasons: Mapping[str, int] | None = None
    success_us: int = 0
    clean_us: int = 0

    def take(self, lines: Sequence[RunLine]) -> None:
        """The newest finished one, and when one was last clean."""
        for line in lines:
            finished_us = line.finished_us or 0
            if finished_us > self.success_us:
                self.success_us, self.reasons = finished_us, line.reasons
            if line.outcome == "clean":
                self.clean_us = max(self.clean_us, finished_us)


class ConsistencyService:
    """Compares and repairs for one sidecar: on request, and all the time. See ``sidecar.api.consistency.Service``."""

    def __init__(
        self,
        stores: Mapping[StoreName, LedgeredStore],
        spool: Spool,
        settings: Callable[[], Settings],
        phase: InForce,
        *,
        metrics: Metrics,
        instance: str,
        clock: Clock,
    ) -> None:
        """Join the parts; nothing runs yet."""
        self._stores = stores
        self._spool = spool
        self._settings = settings
        self._phase = phase
        self._clock = clock
        self._asked: asyncio.Task[Any] | None = None
        self._last = _Last()
        others = ask_others(stores, settings(), (instance, lambda: spool_name(spool)), clock)
        asked = Together(others, OwnSpool(spool, instance, clock))
        self._validator = build_validator(stores, asked, settings, clock=clock)
        self._ledger: ValidationLedger = home_of(stores).verdicts
        self.evidence = Validations(self._ledger, clock)
        self.late = LateWrites(self._ledger, clock)
        fleet = home_of(stores).fleet
        self.tail = Tail(
            self._validator,
            self.evidence,
            settings=self._paced,
            due=self._due,
            lease=lambda seconds: fleet.acquire_lease(_LEASE, named_apart(instance, spool), seconds),
            finished=self._finished,
            clock=clock,
            by=instance,
        )
        self._mirror = Mirror(spool, fleet, due=self._due, instance=instance, clock=clock)
        spool.on_accepted = self.late.accepted
        self._observe(metrics)

    def _paced(self) -> Validation:
        """The settings as they are now; the index is read at their rate from now on."""
        found = self._settings().validation
        home_of(self._stores).pace(found.rate)
        return found

    def _due(self) -> bool:
        return self._phase.policy.owed == frozenset(STORES)

    # --- all the time ----------------------------------------------------------------------------------------------

    def tasks(self) -> Sequence[tuple[str, Callable[[], Awaitable[None]]]]:
        """What has to run beside: name and what to run until it is cancelled."""
        return (
            ("validation", self.tail.run),
            ("late writes", self._note),
            ("verdicts", self._refresh),
            ("fates", self._mirror.run),
        )

    async def _refresh(self) -> None:
        """What other instances and commands found is in the metrics of all: whoever is scraped says the same.

        With ``validation.interval: 0`` too: then commands and Jobs are all that compares.
        """
        while True:
            if self._due():
                try:
                    self._last.take(await self._ledger.runs(_LOOKED_AT))
                except StoreError as error:
                    log.info("verdicts not read", extra={"store": error.store, "reason": error.reason})
            await self._clock.sleep(min(_REFRESH, max(1.0, self._settings().validation.interval or _REFRESH)))

    async def _note(self) -> None:
        """Late writes; what an earlier run left in the spool first."""
        after: int | None = 0
        while after is not None:
            lines, after = await self._spool.read(partial(view.frames, after=after, limit=1_000))
            spans = [(line.first_us, line.last_us) for line in lines if line.sound]
            self.late.spans(spans, self._clock.now_us())
        while not self._due():
            await self._clock.sleep(1.0)
        await self.late.run()

    async def leave(self) -> None:
        """End what was asked for, note what is not noted yet; DynamoDB has two seconds for each."""
        try:
            async with asyncio.timeout(_FAREWELL):
                await self.stop()
                await self.late.flush()
        except TimeoutError:
            return

    def _finished(self, line: RunLine) -> None:
        self._last.take([line])

    def _observe(self, metrics: Metrics) -> None:
        def seconds(us: int) -> list[tuple[tuple[str, ...], float]]:
            return [((), us / 1e6)] if us else []

        metrics.observe(
            "divergence_at_rest_records",
            lambda: [((name,), float(n)) for name, n in every_reason(self._last.reasons).items()],
        )
        metrics.observe("validation_last_success_timestamp_seconds", lambda: seconds(self._last.success_us))
        metrics.observe("validation_last_clean_timestamp_seconds", lambda: seconds(self._last.clean_us))
        metrics.observe("validation_running", lambda: [((), float(self.tail.running or self._asked is not None))])

    # --- on request ------------------------------------------------------------------------------------------------

    def now_us(self) -> int:
        """See Service."""
        return self._clock.now_us()

    async def validate(self, asked: Asked) -> Mapping[str, object]:
        """See Service."""
        home_of(self._stores).pace(self._settings().validation.rate)
        options = Options(
            deep=asked.deep,
            rate=self._settings().validation.rate,
            examples=asked.examples,
            reveal=asked.reveal,
            by=asked.by,
            keep=not asked.reveal,
        )
        line = await self._alone(self._validator.run(asked.window, options))
        self._finished(line)
        return document(line)

    async def repair(self, wanted: Wanted) -> Mapping[str, object]:
        """See Service."""
        if wanted.overwrite and POSTGRES not in self._phase.policy.writes:
            raise BadRequest("overwrite: PostgreSQL is not written in this phase: its rows are not the newer ones")
        settings = self._settings()
        home_of(self._stores).pace(settings.validation.rate)
        repair = build_repair(
            self._stores, settings, clock=self._clock, dry_run=wanted.dry_run, overwrite=wanted.overwrite
        )
        by = f"repair by {wanted.by}: {wanted.why}"
        options = Options(deep=wanted.deep, rate=settings.validation.rate, by=by)
        line = await self._alone(self._validator.run(wanted.window, options, found=repair.mend))
        return {"repair": repair.result.document(), "report": document(line)}

    async def _alone(self, run: "asyncio._CoroutineLike[_T]") -> _T:
        """One at a time; a caller that goes away does not end it, ``stop`` does."""
        if self._asked is not None:
            run.close()
            raise Busy("validation_running", "a validation is under way: wait for it, or stop it", 30)
        task = asyncio.get_running_loop().create_task(run)
        self._asked = task
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise Busy("validation_stopped", "the validation was stopped", 1) from None
            raise
        finally:
            if task.done():
                self._asked = None
            else:
                task.add_done_callback(self._over)

    def _over(self, task: "asyncio.Task[Any]") -> None:
        self._asked = None
        if not task.cancelled():
            task.exception()  # nobody waits for it any more; the ledger says how it ended

    async def stop(self) -> bool:
        """See Service."""
        task = self._asked
        if task is None:
            return False
        task.cancel()
        await asyncio.wait([task])
        return True

    async def known(self) -> Mapping[str, object]:
        """See Service."""
        days, tail = await self.evidence.days(), await self.evidence.tail()
        return {
            "running": {"request": self._asked is not None, "tail": self.tail.running, "leads": self.tail.leads},
            "tail": None
            if tail is None
            else {
                "start": timestamp_text(tail.start_us),
                "end": timestamp_text(tail.end_us),
                "finished_at": timestamp_text(tail.finished_us),
                "compared": tail.compared,
                "unexplained": tail.unexpected,
            },
            "days": None
            if days is None
            else {
                "known": days.days,
                "clean": days.days - len(days.unclean) - len(days.stale),
                "unclean": [timestamp_text(day * DAY_US)[:10] for day in days.unclean],
                "stale": [timestamp_text(day * DAY_US)[:10] for day in days.stale],
            },
            "runs": [document(line) for line in await self._ledger.runs(_SHOWN)],
        }

    async def whereabouts(self, log_ids: Sequence[str]) -> Mapping[str, Mapping[StoreName, Known]]:
        """See Service."""
        return await fates_of_spool(self._spool, log_ids)


def every_reason(reasons: Mapping[str, int] | None) -> dict[str, int]:
    """All classes, 0 where there is none; empty before the first validation."""
    if reasons is None:
        return {}
    found = document(RunLine(id="", start_us=0, end_us=0, reasons=dict(reasons)))["reasons"]
    return cast("dict[str, int]", found)
