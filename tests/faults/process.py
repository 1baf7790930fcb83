"""Starting a sidecar in unusual circumstances: sabotaged, broken by strace, with limits."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from tests.parts.nursery import NURSERY
from tests.parts.sidecar import ROOT, Sidecar, eventually


def launch(
    sidecar: Sidecar,
    *,
    under: Sequence[str] = (),
    without: str = "",
    environ: Mapping[str, str] | None = None,
) -> None:
    """Start it, without waiting, ``under`` another program, ``without`` the guarantee that a sabotage takes out."""
    module = ["tests.faults.sabotaged", without] if without else ["sidecar"]
    words = [*module, "serve", "--config", str(sidecar.mount.directory / "config.yaml")]
    env = {**os.environ, "AWS_EC2_METADATA_DISABLED": "true", **sidecar.environ, **(environ or {})}
    if not under and not environ:
        sidecar.process = NURSERY.launch(words, env, sidecar.log)
        return
    with sidecar.log.open("ab") as log:
        sidecar.process = subprocess.Popen(
            [*under, sys.executable, "-m", *words], cwd=ROOT, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )


async def start(
    sidecar: Sidecar, *, under: Sequence[str] = (), without: str = "", environ: Mapping[str, str] | None = None
) -> Sidecar:
    """Start it and wait until it is ready."""
    launch(sidecar, under=under, without=without, environ=environ)
    await sidecar.ready(60)
    return sidecar


async def began(sidecar: Sidecar) -> bool:
    """Wait until it is ready, or has ended on the way there; whether it is ready."""
    process = sidecar.process
    assert process is not None
    try:
        await sidecar.ready(60)
    except AssertionError:
        if process.poll() is None:
            raise
        return False
    return True


async def advances(count: Callable[[], Awaitable[float]], wanted: float, *, still: float = 60.0, what: str) -> None:
    """Await that a count reaches a number, however slow the machine is; fail only where it stands still so long."""
    last, since = await count(), time.monotonic()
    while last < wanted:
        await asyncio.sleep(0.1)
        now = await count()
        if now > last:
            last, since = now, time.monotonic()
        assert time.monotonic() - since < still, f"not one more within {still} s: {what}, {last:.0f} of {wanted:.0f}"


async def ended(sidecar: Sidecar, seconds: float = 20.0) -> int:
    """Wait for the process's end by itself; its exit code (minus the signal's number)."""
    process = sidecar.process
    assert process is not None
    await eventually(lambda: process.poll() is not None, seconds=seconds, what="the end of the process")
    assert process.returncode is not None
    return process.returncode


def tool(name: str) -> str:
    """The path of a program that a row needs; a missing one is a failure, never a skip."""
    found = shutil.which(name)
    assert found is not None, f"{name} is missing; .ci/run installs it"
    return found


async def command(*words: str | Path) -> str:
    """Run a program to its end without holding up the loop; its output."""
    process = await asyncio.create_subprocess_exec(
        *map(str, words), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, stdin=subprocess.DEVNULL
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, f"{words}: {process.returncode}: {output.decode()}"
    return output.decode()


@asynccontextmanager
async def injected(
    sidecar: Sidecar, paths: Sequence[Path], *rules: str, trace: Path, without: str = ""
) -> AsyncIterator[bool]:
    """Start it with system calls on these files broken by strace (``fdatasync:error=EIO:when=5``); is it ready?

    The process stops itself after its imports, so that strace counts from the sidecar's first call. Calls are counted
    by thread; ``trace`` lists them, the broken ones marked ``INJECTED``. The process is ended with the block.
    """
    launch(sidecar, without=",".join(filter(None, ("stopped_after_imports", without))))
    process = sidecar.process
    assert process is not None
    status = Path(f"/proc/{process.pid}/status")
    try:
        await eventually(lambda: "State:\tT" in status.read_text(), seconds=60, what="the imports")
    except BaseException:  # also where the run is interrupted: a stopped process would stay for ever
        sidecar.close()
        raise
    words = [tool("strace"), "-f", "-qq", "-o", str(trace), "-p", str(process.pid), "-e", "signal=none"]
    for path in paths:
        words += ["-P", str(path)]
    words += ["-e", f"trace={','.join(dict.fromkeys(rule.split(':')[0] for rule in rules))}"]
    for rule in rules:
        words += ["-e", f"inject={rule}"]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL) as strace:
        try:
            await eventually(lambda: "TracerPid:\t0" not in status.read_text(), what="strace")
            process.send_signal(signal.SIGCONT)
            yield await began(sidecar)
        finally:
            sidecar.close()
            await asyncio.to_thread(strace.wait, 20)
