"""Carries out a Dockerfile without Docker, instruction by instruction, and starts the result as a container would be.

Each stage is a copy-on-write view (overlayfs) of this machine's root in a mount namespace of its own: what a stage
installs, removes or changes stays in the stage's directory and never reaches the machine. What cannot be replayed is
the base image itself; this machine's Python stands in for it.

Needs root. An instruction that is not understood fails; nothing is passed over silently.
"""

import fnmatch
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

BASE_PATH = f"{sys.base_prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# A build reaches the package index with what this machine is given for that, and knows nothing else of it.
NETWORK = tuple(
    n for n in os.environ if n.lower().endswith("_proxy") or n in {"PIP_CERT", "PIP_INDEX_URL", "SSL_CERT_FILE"}
)
METADATA = {"LABEL", "EXPOSE", "VOLUME", "STOPSIGNAL", "HEALTHCHECK", "CMD", "ENTRYPOINT", "USER"}


@dataclass
class Stage:
    """One stage: its layers on disk and what its instructions set."""

    directory: Path
    environ: dict[str, str] = field(default_factory=lambda: {"PATH": BASE_PATH})
    workdir: str = "/"
    settings: dict[str, str] = field(default_factory=dict)  # the last value of each instruction of METADATA

    def __post_init__(self) -> None:
        for name in ("upper", "work", "root"):
            (self.directory / name).mkdir(parents=True)
        # The stand-in for the base image's Python may live where only root may look.
        opened = [str(p) for p in [Path(sys.base_prefix), *Path(sys.base_prefix).parents][:-1]]
        self.enter(f"chmod o+rx {shlex.join(opened)}", workdir="/")

    def script(self, command: str, *, outside: str = "", workdir: str | None = None) -> list[str]:
        """The command line that runs a shell command inside this stage; ``outside`` runs before, with $ROOT set."""
        d = self.directory
        steps = (
            f"ROOT={shlex.quote(str(d / 'root'))}",
            f"mount -t overlay overlay -o lowerdir=/,upperdir={d / 'upper'},workdir={d / 'work'} $ROOT",
            "mount --rbind /proc $ROOT/proc",
            "mount --rbind /dev $ROOT/dev",
            outside or ":",
            f"exec chroot $ROOT /bin/sh -c {shlex.quote(f'cd {workdir or self.workdir} && {command}')}",
        )
        return ["unshare", "--mount", "--propagation", "private", "sh", "-ec", "\n".join(steps)]

    def enter(self, command: str, *, outside: str = "", workdir: str | None = None) -> str:
        """Run a shell command inside this stage; its output."""
        environ = {name: os.environ[name] for name in NETWORK} | self.environ | {"HOME": "/root"}
        done = subprocess.run(
            self.script(command, outside=outside, workdir=workdir),
            check=False,
            env=environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
        assert done.returncode == 0, f"RUN {command}\n{done.stdout[-4000:]}"
        return done.stdout


def context(source: Path, target: Path) -> None:
    """Copy the build context as Docker sends it: the last matching line of .dockerignore decides."""
    lines = (source / ".dockerignore").read_text().splitlines()
    rules = [(line.lstrip("!"), line.startswith("!")) for line in lines if line.strip() and not line.startswith("#")]

    def sent(name: str) -> bool:
        kept = True
        parts = name.split("/")
        for pattern, keeps in rules:
            heads = ["/".join(parts[: n + 1]) for n in range(len(parts))]
            shapes = [pattern, pattern.removeprefix("**/")]
            if any(fnmatch.fnmatchcase(head, shape) for head in heads for shape in shapes):
                kept = keeps
        return kept

    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=source,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in tracked.splitlines():
        if sent(name) and (source / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)


def build(dockerfile: Path, scratch: Path) -> Stage:
    """Carry out every instruction; the last stage."""
    sent = scratch / "context"
    sent.mkdir()
    context(dockerfile.parent, sent)
    parser = DockerfileParser(fileobj=io.BytesIO(dockerfile.read_bytes()))
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for step in parser.structure:
        name, value = step["instruction"], step["value"]
        if name == "COMMENT" or (name == "ARG" and stage is None):
            continue
        if name == "FROM":
            label = value.split()[-1] if " AS " in value else f"stage-{len(stages)}"
            stage = stages[label] = Stage(scratch / label)
            continue
        assert stage is not None, f"{name} before FROM"
        match name:
            case "ENV":
                for pair in shlex.split(value):
                    key, _, text = pair.partition("=")
                    stage.environ[key] = text.replace("$PATH", stage.environ["PATH"])
            case "ARG":
                key, _, text = value.partition("=")
                stage.environ.setdefault(key, text)
            case "WORKDIR":
                stage.workdir = value
                stage.enter(f"mkdir -p {shlex.quote(value)}", workdir="/")
            case "RUN":
                stage.enter(value)
            case "COPY":
                _copy(stage, value, sent, stages)
            case _ if name in METADATA:
                stage.settings[name] = value
            case _:
                raise AssertionError(f"an instruction that is not replayed: {name} {value}")
    assert stage is not None
    return stage


def _copy(stage: Stage, value: str, sent: Path, stages: Mapping[str, Stage]) -> None:
    words = value.split()
    origin = sent
    if words[0].startswith("--from="):
        origin = stages[words.pop(0).removeprefix("--from=")].directory / "upper"
    assert not words[0].startswith("--"), f"an option that is not replayed: {value}"
    *sources, target = words
    where = target if target.startswith("/") else f"{stage.workdir}/{target}"
    into = where if len(sources) > 1 or target.endswith("/") else str(Path(where).parent)
    paths = [str(origin / source.lstrip("/")) for source in sources]
    assert len(sources) > 1 or target.endswith("/") or Path(where).name == Path(sources[0]).name, value
    stage.enter("true", outside=f'mkdir -p "$ROOT{into}" && cp -a {shlex.join(paths)} "$ROOT{into}/"', workdir="/")


def start(stage: Stage, mounts: Mapping[str, Path], environ: Mapping[str, str], args: Sequence[str] = ()) -> list[str]:
    """The command line of a container: read-only root, the image's user, no capability, only these mounts writable."""
    uid, _, gid = stage.settings["USER"].partition(":")
    words = [*json.loads(stage.settings["ENTRYPOINT"]), *(args or json.loads(stage.settings["CMD"]))]
    binds = [
        f'mkdir -p "$ROOT{where}" && mount --bind {shlex.quote(str(path))} "$ROOT{where}"'
        for where, path in mounts.items()
    ]
    outside = "\n".join(
        [
            *(f'mkdir -p "$ROOT{where}"' for where in mounts),
            "mount -o remount,ro $ROOT",
            *(bind.split(" && ", 1)[1] for bind in binds),
            "mount -t tmpfs tmpfs $ROOT/tmp",
        ]
    )
    inside = shlex.join(
        [
            *("env", "-i", *(f"{k}={v}" for k, v in {**stage.environ, **environ}.items())),
            *("setpriv", "--reuid", uid, "--regid", gid, "--clear-groups", "--no-new-privs"),
            *("--inh-caps", "-all", "--bounding-set", "-all"),
            *words,
        ]
    )
    return stage.script(f"exec {inside}", outside=outside, workdir="/")
