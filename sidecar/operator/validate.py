"""``sidecar validate`` and ``sidecar repair``: compare the two stores from here, with a progress bar.

They read the stores themselves, so that the sidecar's own process has nothing to do with it; they ask the running
sidecar (``--url``, with the control token), the fleet's tables where ``fleet.enabled``, or the files of a stopped one,
what is still owed. Where nobody can be asked the report warns of it.

The report is JSON on stdout, everything else goes to stderr. Exit codes: 0 clean, 1 divergent, 2 it could not be
checked, or not decided: a store failed, it was stopped, records are still on their way. For ``repair``: 0 everything
that it may mend is mended (or would be), 1 something is left or was refused, 2 as above.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from sidecar.api.consistency import day_before, parse_bound
from sidecar.app.consistency import ask_others, build_repair, build_validator, home_of
from sidecar.app.delivery import build_stores
from sidecar.clock import Clock, SystemClock
from sidecar.config import load
from sidecar.consistency import Known, Nobody, Options, Progress, Settled, Together, Whereabouts, Window, document
from sidecar.errors import BadRequest, ConfigError, Forbidden, NotFound, StoreError, Unauthorized
from sidecar.operator.client import Client, actor
from sidecar.operator.commands import client_of, listens
from sidecar.operator.progress import Progress as Bar
from sidecar.phase import POSTGRES, STORES, TABLE, StoreName
from sidecar.settings import Settings
from sidecar.spool import disk
from sidecar.spool.inspect import StoppedSpool
from sidecar.stores.base import CountQuery
from sidecar.verdicts import CLOCKS, DAY_US, RunLine

EXITS: Final[Mapping[str, int]] = {"clean": 0, "divergent": 1}
COULD_NOT: Final = 2
_POLL: Final = 0.5  # seconds between two looks at a sidecar's account
_ASK: Final = "/api/control/whereabouts"
_AT_ONCE: Final = 1_000  # ids in one question


async def validate(args: argparse.Namespace) -> int:
    """Compare; the exit code. Raises ConfigError where the command line is wrong."""
    if args.reveal and not args.why.strip():
        raise ConfigError("--why", seen="nothing", allowed="a text", hint="say why values are shown: it is kept")
    async with _Job.opened(args) as job:
        by = f"command line {actor()}" + (f": {args.why.strip()}" if args.why.strip() else "")
        options = job.options(by=f"{by} (values shown)" if args.reveal else by, reveal=args.reveal)
        line = await job.run(options, resume=args.resume)
        if line is None:
            return COULD_NOT
        _print(document(line))
        await job.say_overtaken(line)
        return EXITS.get(line.outcome, COULD_NOT)


async def repair(args: argparse.Namespace) -> int:
    """Compare and mend; the exit code. Raises ConfigError where the command line is wrong."""
    if args.apply and not args.why.strip():
        raise ConfigError("--why", seen="nothing", allowed="a text", hint="say why: it is kept with the run")
    async with _Job.opened(args) as job:
        if args.overwrite and POSTGRES not in TABLE[job.settings.phase].writes:
            raise ConfigError(
                "--overwrite",
                seen=f"phase {job.settings.phase.label}",
                allowed="a phase that writes PostgreSQL",
                hint="its rows are not the newer ones",
            )
        mender = build_repair(
            job.stores, job.settings, clock=job.clock, dry_run=not args.apply, overwrite=args.overwrite
        )
        verb = "repair" if args.apply else "repair (dry run)"
        line = await job.run(job.options(by=f"{verb} by {actor()}: {args.why.strip()}"), found=mender.mend)
        if line is None:
            _print({"repair": mender.result.document(), "report": None})
            return COULD_NOT
        _print({"repair": mender.result.document(), "report": document(line)})
        left = sum(
            n for reason, n in mender.result.left.items() if reason not in ("expected_gap", "expired", "acknowledged")
        )
        return 1 if left or mender.result.refused_total or mender.result.changed_meanwhile else 0


class _Job:
    """What both verbs need, open."""

    def __init__(self, args: argparse.Namespace, settings: Settings, clock: Clock) -> None:
        self._args = args
        self.settings = settings
        self.clock = clock
        self.stores = build_stores(settings, clock)
        self._bar = Bar("compared")
        self._window = _window(args, clock.now_us())
        self._task: asyncio.Task[Any] | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, args: argparse.Namespace) -> Any:
        """Closes the stores at the end."""
        job = cls(args, load(args.config, os.environ).settings, SystemClock())
        try:
            yield job
        finally:
            job._bar.close()
            for store in job.stores.values():
                await store.close()

    def options(self, *, by: str, reveal: bool = False) -> Options:
        """As the command line says."""
        rate = self.settings.validation.rate if self._args.rate is None else self._args.rate
        return Options(
            deep=self._args.deep,
            rate=rate,
            examples=self._args.examples,
            reveal=reveal,
            by=by,
            keep=not reveal,
        )

    async def run(self, options: Options, *, resume: bool = False, found: Any = None) -> RunLine | None:
        """One run with its bar; None where it could not be brought to an end, and stderr says why."""
        home_of(self.stores).pace(options.rate)
        validator = build_validator(self.stores, self._whereabouts(), lambda: self.settings, clock=self.clock)
        loop = asyncio.get_running_loop()
        try:
            before = await validator.resumable(None) if resume else None
            if resume and before is None:
                _say("there is no run to go on with; a new one begins")
            total = await self._expected(before)
            self._task = asyncio.ensure_future(
                validator.run(
                    self._window, options, resume=before, progress=lambda p: self._show(p, total), found=found
                )
            )
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._task.cancel)
            line: RunLine = await self._task
            return line  # noqa: TRY300  (the task may raise)
        except StoreError as error:
            self._bar.close()
            _say(f"could not check: {error}")
        except asyncio.CancelledError:
            self._bar.close()
            _say("stopped; what was compared is kept: --resume goes on")
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
        return None

    async def say_overtaken(self, line: RunLine) -> None:
        """Tell a person which verdicts do not stand although the run came to its end; asking may fail."""
        with contextlib.suppress(StoreError):
            writes = await home_of(self.stores).verdicts.writes()
            days = range(line.start_us // DAY_US, -(-line.end_us // DAY_US))
            number = sum(day in days and at_us >= line.started_us - CLOCKS for day, at_us in writes.items())
            if number:
                _say(
                    f"{number} days were written to less than a minute before this run began, or since: their verdicts"
                    " do not count for a phase change yet; validate them again, or leave it to the sidecars' own rounds"
                )

    async def _expected(self, before: RunLine | None) -> int | None:
        """About how many records there are to compare in PostgreSQL; None: it is not known."""
        start = self._window.start_us if before is None else before.next_us
        end = self._window.end_us if before is None else before.end_us
        with contextlib.suppress(StoreError):
            return (await self.stores[POSTGRES].estimate(CountQuery(start, end - 1))).count
        return None

    def _show(self, progress: Progress, total: int | None) -> None:
        done = progress.compared // 2
        self._bar.show(done, None if total is None else max(0, total - done), f"{progress.differences} differences")

    def _whereabouts(self) -> Whereabouts:
        asked = [ask_others(self.stores, self.settings, None, self.clock)]
        client = client_of(self._args, self.settings)
        directory = Path(self.settings.spool.directory)
        if listens(client):
            asked.append(OfSidecar(client, self.clock))
        elif (directory / disk.DATABASE).exists():
            asked.append(OfFiles(directory))
        elif not self.settings.fleet.enabled:
            asked.append(Nobody())
        return Together(*asked)


class OfSidecar:
    """A running sidecar, through its API."""

    def __init__(self, client: Client, clock: Clock) -> None:
        self._client = client
        self._clock = clock
        self._mute = False  # it does not answer us: no token, or an older version

    async def settle(self, patience: float) -> Settled:
        """Wait until it has settled what it had accepted by now."""
        by = self._clock.now_us()
        end = self._clock.monotonic() + patience
        try:
            await asyncio.to_thread(self._client.post, _ASK, {"log_ids": []})
        except (Unauthorized, Forbidden, NotFound) as error:
            self._mute = True
            return Settled(warnings=(f"the sidecar at {self._client.address} did not say what it owes: {error}",))
        while True:
            status = await asyncio.to_thread(self._client.get, "/status")
            ages = [store["account"]["oldest_pending_us"] for store in status["stores"].values()]
            if not any(us is not None and us <= by for us in ages) or self._clock.monotonic() >= end:
                return Settled(asked=(f"{status['instance']} at {self._client.address}",))
            await self._clock.sleep(_POLL)

    async def fates(self, log_ids: Sequence[str]) -> Mapping[str, Mapping[StoreName, Known]]:
        """What its spool knows."""
        found: dict[str, Mapping[StoreName, Known]] = {}
        if self._mute:
            return found
        for start in range(0, len(log_ids), _AT_ONCE):
            body = {"log_ids": list(log_ids[start : start + _AT_ONCE])}
            answer = await asyncio.to_thread(self._client.post, _ASK, body)
            found |= msgspec.convert(answer["records"], dict[str, dict[StoreName, Known]])
        return found


class OfFiles:
    """The files of a stopped sidecar: what is in them is delivered by its next start."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def settle(self, patience: float) -> Settled:  # noqa: ARG002  (the port's signature)
        """Nobody delivers: there is nothing to wait for."""
        return Settled(
            asked=(f"the files in {self._directory}",), warnings=("the sidecar is stopped: what it owes stays owed",)
        )

    async def fates(self, log_ids: Sequence[str]) -> Mapping[str, Mapping[StoreName, Known]]:
        """What is in frames and leftovers."""
        return await asyncio.to_thread(self._read, frozenset(log_ids))

    def _read(self, wanted: frozenset[str]) -> dict[str, dict[StoreName, Known]]:
        found: dict[str, dict[StoreName, Known]] = {}
        with StoppedSpool(self._directory) as spool:
            for item in spool.records():
                if item.record.log_id in wanted:
                    stores = item.stores or dict.fromkeys(STORES, "pending")
                    found[item.record.log_id] = {s: Known(fate) for s, fate in stores.items() if s in STORES}
            for deferred in (True, False):
                for letter in spool.letters(deferred=deferred):
                    if letter.log_id in wanted and letter.store in STORES:
                        fate = "deferred" if deferred else "dead_lettered"
                        found.setdefault(letter.log_id, {})[letter.store] = Known(fate, letter.retry_class)
        return found


def _window(args: argparse.Namespace, now_us: int) -> Window:
    if args.all:
        if args.start or args.end:
            raise ConfigError("--all", seen="--start or --end too", allowed="one of them", hint="leave one out")
        return Window.all_until(now_us)
    try:
        end = parse_bound("--end", args.end, end=True) + 1 if args.end else now_us
        start = parse_bound("--start", args.start, end=False) if args.start else day_before(end)
    except BadRequest as error:
        raise ConfigError("--start, --end", seen=f"{args.start}, {args.end}", allowed=str(error)) from None
    if start >= end:
        raise ConfigError("--start", seen=args.start, allowed="a time before --end")
    return Window(start, end)


def _print(told: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(msgspec.to_builtins(told), indent=2) + "\n")
    sys.stdout.flush()


def _say(text: str) -> None:
    sys.stderr.write(f"sidecar: {text}\n")
    sys.stderr.flush()
