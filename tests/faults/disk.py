"""A disk that is ours to break: ext4 in an image on a loop device, cut off as by a power cut, mounted again."""

import asyncio
import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

_SHUTDOWN: Final = 0x8004587D  # EXT4_IOC_SHUTDOWN
_NO_FLUSH: Final = 2  # EXT4_GOING_FLAGS_NOLOGFLUSH: what is not on the disk by now never will be
MIB: Final = 1024 * 1024


class Disk:
    """One image and its mount point."""

    def __init__(self, image: Path, point: Path, size: int) -> None:
        self.image = image
        self._lives = 0
        self.point = point
        with image.open("wb") as file:
            file.truncate(size)
        point.mkdir()
        _run("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", str(image))
        self.mount()

    def mount(self) -> None:
        """Attach it; the journal is replayed."""
        _run("mount", "-o", "loop", str(self.image), str(self.point))

    def unmount(self) -> None:
        """Detach it; whoever had it open has ended, or is about to."""
        for _ in range(100):
            done = subprocess.run(["umount", str(self.point)], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return
            assert "busy" in done.stderr, done.stderr
            time.sleep(0.05)
        raise AssertionError(f"{self.point} stays busy")

    def cut(self) -> None:
        """The power goes: from this moment each call on the file system fails, unsynced pages are lost."""
        fd = os.open(self.point, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_FLUSH))
        finally:
            os.close(fd)

    def sync(self) -> None:
        """Names that were made or removed survive the next power cut: the directory is flushed with its journal."""
        fd = os.open(self.point, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    async def power_on(self) -> None:
        """What the device holds, copied to another one and mounted; the journal is replayed.

        Not the same device again: where any process of the machine has a mount namespace of its own (a browser's
        sandbox is enough), the dead file system lives on in there, and mounting the device would give it back.
        """
        await asyncio.to_thread(self._power_on)

    def _power_on(self) -> None:
        self.unmount()
        self._lives += 1
        fresh = self.image.with_suffix(f".{self._lives}")
        _run("cp", "--sparse=always", str(self.image), str(fresh))
        self.image.unlink()
        self.image = fresh
        self.mount()

    def close(self) -> None:
        """Detach it whatever its state."""
        subprocess.run(["umount", "--lazy", str(self.point)], capture_output=True, check=False)


@contextmanager
def made(base: Path, size: int = 96 * MIB, name: str = "disk") -> Iterator[Disk]:
    """A fresh mounted disk under ``base``."""
    disk = Disk(base / f"{name}.image", base / name, size)
    try:
        yield disk
    finally:
        disk.close()
        disk.image.unlink(missing_ok=True)


def spool_on(disk: Disk, **changes: Any) -> dict[str, Any]:
    """Settings of a spool on the disk."""
    return {"directory": str(disk.point / "spool"), "allow_volatile": False, "ballast_bytes": 0, **changes}


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
