"""Starting a sidecar in unusual circumstances: sabotaged, under strace, with limits, in a namespace, as another user."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

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
    with sidecar.log.open("ab") as log:
        sidecar.process = subprocess.Popen(
            [
                *under,
                sys.executable,
                "-m",
                *module,
                "serve",
                "--config",
                str(sidecar.mount.directory / "config.yaml"),
            ],
            cwd=ROOT,
            env={**os.environ, "AWS_EC2_METADATA_DISABLED": "true", **sidecar.environ, **(environ or {})},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )


async def start(
    sidecar: Sidecar, *, under: Sequence[str] = (), without: str = "", environ: Mapping[str, str] | None = None
) -> Sidecar:
    """Start it and wait until it is ready."""
    launch(sidecar, under=under, without=without, environ=environ)
    await sidecar.ready(60)
    return sidecar


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


def injecting(paths: Sequence[Path], *rules: str, trace: str = "") -> list[str]:
    """A command before the sidecar's: strace breaks system calls on these files (``fdatasync:error=EIO:when=5``)."""
    words = [tool("strace"), "-f", "-D", "-qq", "-o", trace or "/dev/null"]
    for path in paths:
        words += ["-P", str(path)]
    calls = ",".join(dict.fromkeys(rule.split(":")[0] for rule in rules))
    words += ["-e", f"trace={calls}", "-e", "signal=none"]
    for rule in rules:
        words += ["-e", f"inject={rule}"]
    return words
