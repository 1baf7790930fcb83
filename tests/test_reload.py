"""Hot reload: what a changed mount does, and that nothing bad in it does anything."""

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from sidecar.config import load
from sidecar.errors import ConfigError
from sidecar.phase import Phase
from sidecar.reload import Change, Watcher, subpath_warning

GOOD = "phase: sql_only\nretry: {attempts: 3}\n"


class AtomicWriter:
    """Writes a volume as kubelet does: a timestamped directory, ``..data_tmp``, one rename over ``..data``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.generation = 0

    def prepare(self, content: bytes) -> Path:
        """The new directory and ``..data_tmp``, everything but the rename."""
        self.generation += 1
        fresh = self.root / f"..2026_11_22_17_{self.generation:02}_00.{self.generation:09}"
        fresh.mkdir(mode=0o755)
        (fresh / "config.yaml").write_bytes(content)
        (self.root / "..data_tmp").symlink_to(fresh.name)
        return fresh

    def write(self, content: str | bytes) -> None:
        """One whole update, and the old directory removed."""
        data = self.root / "..data"
        old = data.resolve() if data.exists() else None
        self.prepare(content.encode() if isinstance(content, str) else content)
        (self.root / "..data_tmp").rename(data)
        link = self.root / "config.yaml"
        if not link.is_symlink():
            link.symlink_to("..data/config.yaml")
        if old is not None:
            (old / "config.yaml").unlink()
            old.rmdir()


class ManualClock:
    """Sleeps until the test says that the time has passed."""

    def __init__(self) -> None:
        self.now = 1_000_000
        self.sleeps: list[float] = []
        self._passed = asyncio.Event()

    def now_us(self) -> int:
        self.now += 1
        return self.now

    def monotonic(self) -> float:
        return self.now / 1e6

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        await self._passed.wait()
        self._passed.clear()

    def pass_time(self) -> None:
        self._passed.set()


class Mounted:
    """A mounted configuration, its watcher, and what the watcher said."""

    def __init__(self, root: Path, content: str = GOOD) -> None:
        self.volume = AtomicWriter(root)
        self.volume.write(content)
        self.path = root / "config.yaml"
        self.changes: list[Change] = []
        self.errors: list[ConfigError] = []
        self.clock = ManualClock()
        self.refuse: ConfigError | None = None
        loaded = load(str(self.path), {})
        self.watcher = Watcher(
            str(self.path),
            loaded,
            on_change=self._changed,
            on_error=self.errors.append,
            clock=self.clock,
            environ={},
        )

    async def _changed(self, change: Change) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.changes.append(change)

    async def look(self, times: int = 2, *, asked: bool = False) -> None:
        for _ in range(times):
            await self.watcher.look(asked=asked)

    @property
    def phase(self) -> Phase:
        return self.watcher.current.settings.phase


@pytest.fixture
def mounted(tmp_path):
    """A good configuration, mounted as kubelet does."""
    return Mounted(tmp_path)


# --- changes


async def test_each_swap_is_noticed_at_the_next_look(mounted):
    """Every one of many AtomicWriter updates is handed over once, by the look that follows it."""
    for number in range(4, 24):
        mounted.volume.write(f"phase: sql_only\nretry: {{attempts: {number}}}\n")
        await mounted.look(3)
        assert [c.loaded.settings.retry.attempts for c in mounted.changes] == list(range(4, number + 1))
    assert mounted.changes[0].changed == ("retry.attempts",)
    assert mounted.errors == []


async def test_unchanged_file_hands_over_nothing(mounted):
    """Looks at the same content say nothing, SIGHUP included."""
    await mounted.look(5)
    await mounted.look(asked=True)
    assert (mounted.changes, mounted.errors, mounted.watcher.last_successful) == ([], [], True)


async def test_swap_to_the_same_content_hands_over_nothing(mounted):
    """A new directory with equal bytes is no change."""
    mounted.volume.write(GOOD)
    await mounted.look()
    assert mounted.changes == []


async def test_writes_that_stat_cannot_tell_apart_are_noticed(tmp_path, monkeypatch):
    """Two writes of equal size within one tick of the clock: the second is read by the look after the first."""
    mounted = Mounted(tmp_path)
    file = mounted.path.resolve()
    await mounted.look()
    file.write_text(GOOD.replace("3", "4"))
    await mounted.look(1)
    before = file.stat()
    file.write_text(GOOD.replace("3", "5"))
    real_stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **kw: before if path == file else real_stat(path, **kw))
    await mounted.look(1)
    assert [c.loaded.settings.retry.attempts for c in mounted.changes] == [4, 5]


async def test_half_done_swap_changes_nothing_until_the_rename(mounted):
    """With everything prepared but the rename, the old content stays; the rename brings the new."""
    mounted.volume.prepare(b"phase: dual_write\n")
    await mounted.look()
    assert (mounted.changes, mounted.errors) == ([], [])
    (mounted.volume.root / "..data_tmp").rename(mounted.volume.root / "..data")
    await mounted.look()
    assert mounted.phase is Phase.DUAL_WRITE


async def test_digest_and_comments(mounted):
    """A change of comments alone is handed over for its new digest, with no changed setting."""
    mounted.volume.write(GOOD + "# note\n")
    await mounted.look()
    (change,) = mounted.changes
    assert change.changed == ()
    assert change.loaded.digest == mounted.watcher.current.digest == load(str(mounted.path), {}).digest


# --- what needs a restart


async def test_settings_that_are_not_live_are_reported_and_kept(mounted):
    """A new spool directory is named in restart_required; live settings of the same file apply."""
    mounted.volume.write("phase: dual_write\nspool: {directory: /elsewhere}\npostgres: {host: db2}\n")
    await mounted.look()
    (change,) = mounted.changes
    assert change.restart_required == ("spool.directory", "postgres.host")
    assert mounted.watcher.restart_required == change.restart_required
    assert change.loaded.settings.spool.directory == "/var/lib/sidecar/spool"
    assert mounted.phase is Phase.DUAL_WRITE


async def test_restart_required_goes_when_the_file_goes_back(mounted):
    """Putting the running value back into the file leaves nothing that needs a restart."""
    mounted.volume.write(GOOD + "spool: {directory: /elsewhere}\n")
    await mounted.look()
    mounted.volume.write(GOOD)
    await mounted.look()
    assert [c.restart_required for c in mounted.changes] == [("spool.directory",), ()]
    assert mounted.watcher.restart_required == ()


async def test_mixture_of_old_and_new_obeys_the_rules(mounted):
    """A body bound that fits only the new spool is refused with the restart that it waits for."""
    mounted.volume.write(GOOD + "spool: {cap_bytes: 8GiB}\ningest: {max_body_bytes: 2GiB}\n")
    await mounted.look()
    (error,) = mounted.errors
    assert error.setting == "ingest.max_body_bytes"
    assert "restart together with spool.cap_bytes" in error.hint
    assert mounted.changes == []


# --- failures


def _replace(mounted: Mounted, make: Callable[[Path], object]) -> None:
    file = mounted.path.resolve()
    file.unlink()
    make(file)


def _listen_on(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:  # the name stays when the socket is closed
        old = Path.cwd()
        os.chdir(path.parent)  # a socket's name holds 107 bytes
        try:
            listener.bind(path.name)
        finally:
            os.chdir(old)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join(['*' + chr(ord(c) - 1)] * 9)}]\n" for c in "bcdefgh"
)
CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "one newline": b"\n",
    "only comments": b"# nothing\n",
    "null document": b"null\n",
    "NUL bytes": b"\0" * 512,
    "NUL in the middle": b"phase: dual\0_write\n",
    "10 MB of spaces": b" " * 10_000_000,
    "10 MB of text": b"phase: dual_write\n" + b"#" * 10_000_000,
    "UTF-16": "phase: dual_write\n".encode("utf-16"),
    "UTF-16 big endian": b"\xfe\xff" + "phase: dual_write\n".encode("utf-16-be"),
    "UTF-32": "phase: dual_write\n".encode("utf-32"),
    "Latin-1": "phase: dual_write # Übergang\n".encode("latin-1"),
    "invalid UTF-8": b"phase: \xff\xfe\xfd\n",
    "UTF-8 of half a surrogate pair": b"phase: dual_write # \xed\xa0\x80\n",
    "control characters": b"phase: \x1b[31mdual_write\n",
    "gzip": b"\x1f\x8b\x08\0\0\0\0\0\0\x03+\xc8H,N\xb5R",
    "ELF": b"\x7fELF\x02\x01\x01\0",
    "HTML": b"<html><body>404 not found</body></html>",
    "a list": b"- phase: dual_write\n",
    "a single word": b"dual_write\n",
    "a number": b"42\n",
    "unclosed quote": b"phase: 'dual_write\n",
    "unclosed brace": b"{phase: dual_write",
    "bad indentation": b"phase: dual_write\n  retry:\n attempts: 3\n",
    "tab as indentation": b"retry:\n\tattempts: 3\n",
    "cut off in a name": b"phase: dual_wri",
    "cut off before the value": b"phase:",
    "cut off above the phase": b"retry: {attempts: 4}\n",
    "empty mapping": b"{}\n",
    "a key twice": b"phase: dual_write\nphase: sql_only\n",
    "two documents": b"phase: dual_write\n---\nphase: sql_only\n",
    "YAML bomb": b"phase: dual_write\n" + BOMB.encode(),
    "alias to itself": b"phase: &a [*a]\n",
    "deep nesting": b"[" * 10_000,
    "Python object": b"phase: !!python/object/apply:os.system ['true']\n",
    "merge key": b"<<: {phase: dual_write}\n",
    "unknown phase": b"phase: triple_write\n",
    "phase out of range": b"phase: 4\n",
    "phase as a bool": b"phase: true\n",
    "unknown key": b"phase: dual_write\nretires: {attempts: 3}\n",
    "contradictory flags": b"phase: dual_write\nflags: {writes_to_dynamodb: false}\n",
    "two spellings that differ": b"phase: dual_write\nHybridLogging: {CurrentPhase: SqlOnly}\n",
    "out of bounds": b"phase: dual_write\nretry: {attempts: 0}\n",
    "crossed watermarks": b"phase: dual_write\nspool: {low_watermark: 0.95}\n",
    "undefined variable": b"phase: ${NO_SUCH_VARIABLE}\n",
    "merge conflict": b"<<<<<<< HEAD\nphase: dual_write\n=======\nphase: sql_only\n>>>>>>> x\n",
}
PLACES: dict[str, Callable[[Mounted], object]] = {
    "vanished file": lambda m: m.path.resolve().unlink(),
    "vanished ..data": lambda m: (m.volume.root / "..data").unlink(),
    "vanished link": lambda m: m.path.unlink(),
    "dangling link": lambda m: ((m.volume.root / "..data").unlink(), (m.volume.root / "..data").symlink_to("..gone")),
    "link to itself": lambda m: (m.path.unlink(), m.path.symlink_to(m.path)),
    "directory": lambda m: _replace(m, Path.mkdir),
    "FIFO without a writer": lambda m: _replace(m, os.mkfifo),
    "socket": lambda m: _replace(m, _listen_on),
    "device without an end": lambda m: _replace(m, lambda file: file.symlink_to("/dev/zero")),
    "permission denied": lambda m: _replace(m, lambda file: file.symlink_to("/proc/self/mem")),
}  # root may open any mode, so what nobody may read as a file stands for it


@pytest.mark.parametrize("kind", CONTENTS)
async def test_garbage_leaves_the_last_good_in_force(mounted, kind):
    """Whatever stands in the file: settings stay, the gauge falls, one error is reported, the next good one counts."""
    before = mounted.watcher.current
    mounted.volume.write(CONTENTS[kind])
    await mounted.look(4)
    assert mounted.watcher.current is before
    assert mounted.changes == []
    assert len(mounted.errors) == 1
    assert mounted.watcher.last_successful is False

    mounted.volume.write(GOOD)
    await mounted.look()
    assert (mounted.watcher.last_successful, mounted.changes) == (True, [])


@pytest.mark.parametrize("kind", PLACES)
async def test_a_path_that_is_no_file_leaves_the_last_good_in_force(mounted, kind):
    """Vanished, replaced by a directory, a FIFO, a device: never blocks, settings stay, recovery follows."""
    before = mounted.watcher.current
    PLACES[kind](mounted)
    await asyncio.wait_for(mounted.look(4), timeout=30)
    assert mounted.watcher.current is before
    assert (mounted.changes, len(mounted.errors), mounted.watcher.last_successful) == ([], 1, False)

    mounted.path.unlink(missing_ok=True)
    mounted.path.write_text("phase: dual_write\n")
    await mounted.look()
    assert (mounted.phase, mounted.watcher.last_successful) == (Phase.DUAL_WRITE, True)


async def test_each_distinct_failure_is_reported_once(mounted):
    """A lasting failure is one line, another failure another; SIGHUP asks for the line again."""
    mounted.volume.write("phase: nope")
    await mounted.look(3)
    mounted.volume.write("phase: nope # again")
    await mounted.look(3)
    assert len(mounted.errors) == 1
    mounted.volume.write("phase: other")
    await mounted.look(3)
    assert len(mounted.errors) == 2
    await mounted.look(1, asked=True)
    assert len(mounted.errors) == 3


async def test_same_failure_after_a_recovery_is_reported_again(mounted):
    """Once the file was good, the old error is news."""
    for content in ("phase: nope", GOOD, "phase: nope"):
        mounted.volume.write(content)
        await mounted.look()
    assert len(mounted.errors) == 2


async def test_file_cut_off_above_the_phase_does_not_move_it(mounted):
    """A file that no longer states the phase is refused: the default must not become the wish."""
    mounted.volume.write("phase: dual_write\n")
    await mounted.look()
    mounted.volume.write("retry: {attempts: 9}\n")
    await mounted.look()
    assert (mounted.phase, mounted.errors[0].setting) == (Phase.DUAL_WRITE, "phase")


async def test_change_refused_by_its_receiver_is_a_failure(mounted):
    """A ConfigError of ``on_change`` leaves the snapshot as it was and is reported."""
    mounted.refuse = ConfigError("phase", seen=1, allowed="0")
    mounted.volume.write("phase: dual_write\n")
    await mounted.look(3)
    assert (mounted.phase, mounted.errors, mounted.watcher.last_successful) == (Phase.SQL_ONLY, [mounted.refuse], False)


async def test_last_success_is_the_time_of_the_last_good_look(mounted):
    """The timestamp stays through failures and moves with the recovery."""
    start = mounted.watcher.last_success_us
    mounted.volume.write("phase: nope")
    await mounted.look()
    assert mounted.watcher.last_success_us == start
    mounted.volume.write(GOOD)
    await mounted.look()
    assert mounted.watcher.last_success_us > start


# --- the loop


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


async def test_run_polls_at_the_configured_interval(mounted):
    """The loop sleeps ``reload.poll`` between looks and takes a change over after one sleep."""
    task = asyncio.create_task(mounted.watcher.run())
    await _until(lambda: len(mounted.clock.sleeps) == 1)
    mounted.volume.write("phase: dual_write\n")
    mounted.clock.pass_time()
    await _until(lambda: mounted.phase is Phase.DUAL_WRITE)
    assert set(mounted.clock.sleeps) == {1.0}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_trigger_looks_at_once(mounted):
    """SIGHUP does not wait for the poll."""
    task = asyncio.create_task(mounted.watcher.run())
    await _until(lambda: len(mounted.clock.sleeps) == 1)
    mounted.volume.write("phase: dual_write\n")
    mounted.watcher.trigger()
    await _until(lambda: mounted.phase is Phase.DUAL_WRITE)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# --- subPath


def test_subpath_mount_is_warned_of(tmp_path):
    """The file as a mount point is found in mountinfo, octal escapes included; its directory as one is fine."""
    mountinfo = tmp_path / "mountinfo"
    line = "36 35 98:0 /vol {} ro,noatime master:1 - ext4 /dev/root rw\n"
    mountinfo.write_text(line.format("/") + line.format("/etc/side\\040car/config.yaml"))
    assert "subPath" in str(subpath_warning("/etc/side car/config.yaml", str(mountinfo)))
    mountinfo.write_text(line.format("/") + line.format("/etc/sidecar"))
    assert subpath_warning("/etc/sidecar/config.yaml", str(mountinfo)) is None
    assert subpath_warning("/etc/sidecar/config.yaml", str(tmp_path / "none")) is None
