"""The directory that the spool lives in: who may use it, whether it is durable, how much room there is."""

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from zlib import crc32

from sidecar.errors import SpoolLocked, SpoolRefused

DATABASE: Final = "spool.db"
WAL: Final = "spool.db-wal"
KEPT: Final = "spool.db-wal.kept"
FOUND: Final = "spool.db-wal.found"
REPAIR: Final = "repair"
REBUILT: Final = "spool.db.rebuilt"
BALLAST: Final = "ballast"
_VOLATILE: Final = frozenset(
    {"tmpfs", "ramfs", "overlay", "overlayfs", "aufs", "nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph-fuse"}
)
_MOUNTINFO: Final = Path("/proc/self/mountinfo")


def sync_directory(directory: Path) -> None:
    """Fsync a directory, so that the names in it survive a power cut."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Fsync a file by name."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def prepare(directory: Path) -> None:
    """Make the directory (0700) durable; close it to others where it is ours.

    A mount point that belongs to root (an emptyDir) cannot be changed; the files in it are 0600 all the same.

    Raises:
        SpoolRefused: it cannot be made or written.
    """
    try:
        missing = [p for p in (directory, *directory.parents) if not p.exists()]
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for made in missing:
            sync_directory(made.parent)
        status = directory.stat()
        if status.st_uid == os.geteuid() and status.st_mode & 0o077:
            directory.chmod(0o700)
    except OSError as exc:
        raise SpoolRefused(
            f"spool.directory: {directory}: {exc.strerror}; give the sidecar's user this directory"
        ) from exc
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        raise SpoolRefused(f"spool.directory: {directory} is not writable for uid {os.geteuid()}; change its owner")


def file_system(directory: Path, mountinfo: Path = _MOUNTINFO) -> str:
    """The type of the file system that holds ``directory`` (``ext4``); "" where the system does not say."""
    try:
        lines = mountinfo.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except FileNotFoundError:
        return ""
    target = directory.resolve()
    best, kind = -1, ""
    for line in lines:
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        if len(fields) < 5 or not right:  # noqa: PLR2004  (mount point is the fifth field of mountinfo)
            continue
        point = fields[4].encode().decode("unicode_escape") if "\\" in fields[4] else fields[4]
        if target.is_relative_to(point) and len(point) >= best:  # of equals the last is on top
            best, kind = len(point), right.split(" ")[0]
    return kind


def require_durable(directory: Path, *, allow_volatile: bool, mountinfo: Path = _MOUNTINFO) -> None:
    """Refuse a file system that forgets (tmpfs, overlay) or whose locks and fsync are not to be trusted (NFS).

    Raises:
        SpoolRefused: unless ``allow_volatile``.
    """
    kind = file_system(directory, mountinfo)
    if kind in _VOLATILE and not allow_volatile:
        raise SpoolRefused(
            f"spool.directory: {directory} is on {kind}, which does not keep what was acknowledged;"
            " mount a disk there (emptyDir, PVC), or set spool.allow_volatile for a test"
        )


def create_private(path: Path) -> None:
    """Create an empty file with mode 0600 where there is none; SQLite gives its log the same mode."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.fchmod(fd, 0o600)
    finally:
        os.close(fd)


_NO_LINK: Final = frozenset(
    {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSPC, errno.EDQUOT}
)


def keep_log(directory: Path) -> None:
    """Give the write-ahead log a second name, until a stop in order, so that it outlives each closing of SQLite.

    SQLite copies the log into the file and deletes it whenever the connection is closed, at the end of a process too:
    after an error of the disk that is a repetition of what failed, and the next start misses the log. Whatever is in
    it may be copied again without harm: the file was written from it alone. A file system that has no second names, or
    no room for one, goes without.

    Raises:
        OSError: the disk answers with errors.
    """
    log, kept = directory / WAL, directory / KEPT
    if not log.exists() or (kept.exists() and kept.samefile(log)):
        return
    kept.unlink(missing_ok=True)
    try:
        kept.hardlink_to(log)
    except OSError as exc:
        if exc.errno not in _NO_LINK:
            raise


def restore_log(directory: Path) -> None:
    """Where SQLite deleted the log at the end of a process that failed, give it its name back."""
    if not (directory / WAL).exists():
        with contextlib.suppress(FileNotFoundError):
            (directory / KEPT).rename(directory / WAL)


def replace(path: Path, data: bytes) -> None:
    """Put a file with these bytes in the place of ``path``, durably, whole or not at all."""
    making = path.with_name(f"{path.name}.making")
    making.unlink(missing_ok=True)  # of an attempt that was cut off
    create_private(making)
    making.write_bytes(data)
    sync_file(making)
    making.rename(path)
    sync_directory(path.parent)


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write on the file system."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


class Lock:
    """An flock held for the life of the process that owns the spool; the kernel frees it, whatever happens.

    The file has a line in it from the first complete start on: where all else is gone, it says that a spool was here.
    """

    def __init__(self, directory: Path) -> None:
        """Take it.

        Raises:
            SpoolLocked: another process has it.
        """
        self._fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(self._fd)
            raise SpoolLocked(
                f"spool.directory: {directory} is in use by another sidecar; use its control API, or stop it"
            ) from exc

    @property
    def used(self) -> bool:
        """A spool was opened here before."""
        return os.fstat(self._fd).st_size > 0

    def use(self) -> None:
        """Say that a spool was opened here, durably."""
        if not self.used:
            os.pwrite(self._fd, b"a spool lives here\n", 0)
            os.fsync(self._fd)

    def release(self) -> None:
        """Give it back; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


OPENING: Final = 1  # being created, or stopped in order before: nothing was acknowledged since
RUNNING: Final = 2  # may have acknowledged commits that are only in the write-ahead log
CLEAN: Final = 3
_SLOTS: Final = 10
_NAME_BYTES: Final = 24
_LAYOUT: Final = struct.Struct(f"<4sIQ{_SLOTS}Q{_SLOTS * _NAME_BYTES}s")
_MAGIC: Final = b"HLP1"


@dataclass(frozen=True, slots=True)
class Mark:
    """What ``position`` says: the state, the last acknowledged seq, names and records accepted by store bit."""

    state: int
    seq: int
    accepted: tuple[int, ...]
    names: tuple[str, ...]


class Position:
    """The small file that remembers how far acknowledgements went; not fsynced, so it may only be too low."""

    def __init__(self, directory: Path) -> None:
        self._fd = os.open(directory / "position", os.O_RDWR | os.O_CREAT, 0o600)
        self._names = b""

    @staticmethod
    def read(directory: Path) -> Mark | None:
        """What the last process left; None where there is no readable position."""
        try:
            data = (directory / "position").read_bytes()
        except FileNotFoundError:
            return None
        body, tail = data[: _LAYOUT.size], data[_LAYOUT.size : _LAYOUT.size + 4]
        if len(tail) != 4 or body[:4] != _MAGIC or crc32(body) != int.from_bytes(tail, "little"):  # noqa: PLR2004
            return None
        _, state, seq, *accepted, packed = _LAYOUT.unpack(body)
        names = [packed[i : i + _NAME_BYTES].rstrip(b"\0").decode() for i in range(0, len(packed), _NAME_BYTES)]
        return Mark(state, seq, tuple(accepted), tuple(name for name in names if name))

    def name(self, names: Sequence[str]) -> None:
        """Say which store is which bit, for the day when only this file is left of ``progress``."""
        self._names = b"".join(name.encode()[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0") for name in names[:_SLOTS])

    def write(self, state: int, seq: int, accepted: Mapping[int, int]) -> None:
        """Overwrite in place: about a microsecond."""
        slots = [accepted.get(bit, 0) for bit in range(_SLOTS)]
        body = _LAYOUT.pack(_MAGIC, state, seq, *slots, self._names)
        os.pwrite(self._fd, body + crc32(body).to_bytes(4, "little"), 0)

    def sync(self) -> Self:
        """Wait until it is on the disk: at a change of state."""
        os.fsync(self._fd)
        return self

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Ballast:
    """A file that only takes room, to be given up when the disk is full, so that drains can go on."""

    def __init__(self, directory: Path, size: int) -> None:
        self._path = directory / BALLAST
        self._directory = directory
        self._size = size

    @property
    def whole(self) -> bool:
        """True where it is there in full (always, where it is switched off with 0 bytes)."""
        try:
            return self._path.stat().st_size >= self._size
        except FileNotFoundError:
            return self._size == 0

    def make(self) -> bool:
        """Make it where there is twice its room; returns whether it is there now."""
        if self.whole:
            return True
        if free_bytes(self._directory) < 2 * self._size:
            return False
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, self._size)
            else:  # macOS, for development
                os.truncate(fd, self._size)
            os.fsync(fd)
        except OSError:  # no room after all: the file must not stay half made
            self._path.unlink(missing_ok=True)
            return False
        finally:
            os.close(fd)
        sync_directory(self._directory)
        return True

    def drop(self) -> bool:
        """Give the room back; returns whether there was any."""
        try:
            self._path.unlink()
        except FileNotFoundError:
            return False
        return True
