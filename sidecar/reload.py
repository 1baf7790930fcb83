"""Notice that the mounted configuration changed, and hand over one immutable snapshot; or keep the last good one.

HOW A CONFIGMAP CHANGES: kubelet's AtomicWriter makes a new timestamped directory, a symlink ``..data_tmp`` to it, and
renames that over ``..data``; ``config.yaml -> ..data/config.yaml`` itself never changes. Watching the file misses it,
so the path is looked at anew every ``reload.poll`` (semantics, section 8), and at once after :meth:`Watcher.trigger`
(SIGHUP).

ONE LOOK: real path and stat; where they differ from the last look the content is read and hashed; where the hash
differs it is parsed and checked whole. A look after a difference reads once more, because two writes within one tick
of the file system's clock look alike to stat.

WHAT IS HANDED OVER: the settings in ``LIVE`` from the new file, all others from the start. A changed setting that is
not live is reported in ``restart_required``, never half-applied. The mixture passes the rules between settings again.

FAILURE: unreadable, vanished, empty, half-written, hostile, contradictory: the settings in force stay in force,
``last_successful`` is False, and each distinct error is reported once until something changes or is asked for. A file
that no longer states the phase, while the one in force does, is such a failure: a file cut off above that line must not
move the migration back to the default. Reading happens in a thread and is bounded; the event loop never waits for it.
"""

import asyncio
import hashlib
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from sidecar.clock import Clock
from sidecar.config import Loaded, changed, interpret
from sidecar.config_checks import check
from sidecar.config_document import read_bounded
from sidecar.config_values import FIELDS, assemble, value_at
from sidecar.errors import ConfigError
from sidecar.settings import Settings


@dataclass(frozen=True, slots=True)
class Change:
    """A configuration that was taken over."""

    loaded: Loaded  # the settings in force from now on, and the digest of the file that they come from
    changed: tuple[str, ...]  # live settings whose value is another than before
    restart_required: tuple[str, ...]  # settings that the file states otherwise than the process runs with


@dataclass(frozen=True, slots=True)
class _Look:
    """What one look at the path found."""

    signature: tuple[object, ...]
    data: bytes | None  # None: not read, because nothing suggests a difference
    error: ConfigError | None = None


_GONE: Final = ("gone",)


class Watcher:
    """Polls one configuration file for as long as :meth:`run` runs.

    ``current`` is the snapshot in force. ``last_successful`` says whether the file was good when it was last judged,
    ``last_success_us`` when it last was (wall clock, microseconds). ``on_change`` makes the snapshot count; the next
    look waits for it, so what takes long belongs in a task of its own. A ConfigError that it raises refuses the change.
    """

    def __init__(
        self,
        path: str,
        current: Loaded,
        *,
        on_change: Callable[[Change], Awaitable[None]],
        on_error: Callable[[ConfigError], None],
        clock: Clock,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.current = current
        self.restart_required: tuple[str, ...] = ()
        self.last_successful = True
        self.last_success_us = clock.now_us()
        self._path = path
        self._running = current.settings  # what a restart would be needed to change
        self._on_change = on_change
        self._on_error = on_error
        self._clock = clock
        self._environ = environ
        self._signature: tuple[object, ...] | None = None
        self._settled = False  # the content was read again at a later look with the same signature
        self._digest = current.digest  # of the last content that was judged, good or not
        self._reported: str | None = None
        self._wake = asyncio.Event()

    def trigger(self) -> None:
        """Look at once and report again whatever is wrong; for SIGHUP. From the event loop only."""
        self._wake.set()

    async def run(self) -> None:
        """Look again and again until cancelled. Raises what ``on_change`` raises, but for ConfigError."""
        while True:
            asked = await self._pause()
            await self.look(asked=asked)

    async def _pause(self) -> bool:
        """Wait for the next look; True where somebody asked for it."""
        woken = asyncio.ensure_future(self._wake.wait())
        slept = asyncio.ensure_future(self._clock.sleep(self._running.reload.poll))
        try:
            await asyncio.wait((woken, slept), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (woken, slept):
                task.cancel()
            await asyncio.gather(woken, slept, return_exceptions=True)
        asked = self._wake.is_set()
        self._wake.clear()
        return asked

    async def look(self, *, asked: bool = False) -> None:
        """One look at the path; hands over a change, reports a failure, or does nothing."""
        known = None if asked else self._signature
        found = await asyncio.to_thread(_look, self._path, known, settled=self._settled)
        if asked:
            self._reported = None
            self._digest = ""
        if found.error is not None:
            self._signature, self._settled, self._digest = found.signature, False, ""
            self._fail(found.error)
            return
        if found.data is None:
            return
        self._settled = found.signature == self._signature
        self._signature = found.signature
        digest = hashlib.sha256(found.data).hexdigest()
        if digest == self._digest:
            return
        self._digest = digest
        try:
            await self._take(found.data)
        except ConfigError as error:
            self._fail(error)
        else:
            self.last_successful = True
            self.last_success_us = self._clock.now_us()
            self._reported = None

    async def _take(self, data: bytes) -> None:
        loaded = await asyncio.to_thread(interpret, data, self._path, self._environ)
        if "phase" in self.current.stated and "phase" not in loaded.stated:
            raise ConfigError(
                "phase",
                seen="nothing, where the configuration in force states one",
                allowed="the phase, stated",
                hint="restore the line: a file that was cut off must not change the phase",
            )
        restart = tuple(name for name in changed(self._running, loaded.settings) if not FIELDS[name].live)
        settings = _mixture(loaded.settings, self._running)
        try:
            check(settings)
        except ConfigError as error:
            if not restart:
                raise
            raise ConfigError(
                error.setting,
                seen=error.seen,
                allowed=error.allowed,
                hint=f"it needs a restart together with {', '.join(restart)}",
            ) from None
        change = Change(replace(loaded, settings=settings), changed(self.current.settings, settings), restart)
        before = self.current.digest, self.restart_required
        if (loaded.digest, restart) != before or change.changed:
            await self._on_change(change)
        self.current = change.loaded
        self.restart_required = restart

    def _fail(self, error: ConfigError) -> None:
        self.last_successful = False
        if str(error) != self._reported:
            self._reported = str(error)
            self._on_error(error)


def _look(path: str, known: tuple[object, ...] | None, *, settled: bool) -> _Look:
    """Real path and stat, then the content where they differ from ``known``; in a thread."""
    signature: tuple[object, ...] = _GONE
    with suppress(OSError, ValueError):  # then reading says what is wrong
        real = Path(os.path.realpath(path))
        found = real.stat()
        signature = (str(real), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    if signature == known and settled and signature is not _GONE:
        return _Look(signature, None)
    try:
        return _Look(signature, read_bounded(path))
    except ConfigError as error:
        return _Look(signature, None, error)


def _mixture(new: Settings, running: Settings) -> Settings:
    """Live settings from ``new``, the others as they run."""
    return assemble({name: value_at(new if each.live else running, name) for name, each in FIELDS.items()})


_ESCAPED: Final = re.compile(r"\\([0-7]{3})")


def subpath_warning(path: str, mountinfo: str = "/proc/self/mountinfo") -> str | None:
    """A warning where the file itself is a mount point (a subPath mount): then it never changes; else None.

    ``mountinfo`` is the file described in proc(5); where it cannot be read nothing is claimed.
    """
    names = {os.path.abspath(path), os.path.realpath(path)}  # noqa: PTH100  (Path.absolute keeps `..`)
    try:
        with Path(mountinfo).open(encoding="utf-8", errors="surrogateescape") as lines:
            points = [fields[4] for line in lines if len(fields := line.split(" ")) > 4]  # noqa: PLR2004  (proc(5))
    except OSError:
        return None
    if names.isdisjoint(_ESCAPED.sub(lambda match: chr(int(match[1], 8)), point) for point in points):
        return None
    return f"{path} is mounted by itself (subPath): it will never change; mount the ConfigMap's directory instead"
