"""kubelet's part of a pod, replayed: projecting a ConfigMap into a volume, and a pod that has one."""

import itertools
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.parts.sidecar import Sidecar

CONFIG = """\
phase: {phase}
{more}
postgres:
  {{host: {pg.host}, port: {port}, database: {pg.database}, user: {pg.user}, password: '{password}', sslmode: disable}}
dynamodb: {{table: {ddb.table}, fleet_table: {ddb.fleet_table}, region: {ddb.region}, endpoint_url: '{url}'}}
listen: {{app: '127.0.0.1:${{APP_PORT}}', ops: '127.0.0.1:${{OPS_PORT}}'}}
spool: {{directory: '${{SPOOL}}', cap_bytes: 16MiB, ballast_bytes: 1MiB}}
retry: {{delay: 100ms, max_delay: 500ms, probe_interval: 500ms}}
reload: {{poll: 200ms}}
drain: {{timeout: 8s, stop_accepting_before: 2s}}
"""


class ConfigMapVolume:
    """A mounted ConfigMap as kubelet's AtomicWriter keeps it.

    A new timestamped directory is filled and gets its modes; ``..data_tmp`` points to it and is renamed over
    ``..data``; links for new keys are made, links of removed keys go, the old directory goes last. The link
    ``config.yaml`` itself is never touched again. A payload equal to the present one changes nothing at all.
    """

    def __init__(self, directory: Path, *, default_mode: int = 0o644) -> None:
        self.directory = directory
        self._mode = default_mode
        directory.mkdir(parents=True, exist_ok=True)

    def project(self, payload: Mapping[str, bytes]) -> None:
        """Make the volume hold exactly this."""
        data = self.directory / "..data"
        old = self.directory / data.readlink() if data.is_symlink() else None
        present = {p.name: p.read_bytes() for p in old.iterdir()} if old else None
        if present == dict(payload):
            return
        fresh = Path(tempfile.mkdtemp(prefix=time.strftime("..%Y_%m_%d_%H_%M_%S."), dir=self.directory))
        fresh.chmod(0o755)
        for name, content in payload.items():
            (fresh / name).write_bytes(content)
            (fresh / name).chmod(self._mode)
        (self.directory / "..data_tmp").symlink_to(fresh.name)
        (self.directory / "..data_tmp").rename(data)
        for name in payload:
            if not (self.directory / name).is_symlink():
                (self.directory / name).symlink_to(f"..data/{name}")
        for name in (present or {}).keys() - payload.keys():
            (self.directory / name).unlink()
        if old:
            for path in old.iterdir():
                path.unlink()
            old.rmdir()


class Pod(Sidecar):
    """A sidecar as in a pod: the same file in every pod, its own addresses and volume by the environment."""

    def __init__(self, base: Path, *, default_mode: int = 0o644) -> None:
        self.volume = ConfigMapVolume(base / "etc", default_mode=default_mode)
        super().__init__(base, {})
        self.afresh = True
        self.mount = self.volume  # type: ignore[assignment]  # all that is read from it is its directory
        self.environ |= {
            "APP_PORT": str(self.app_port),
            "OPS_PORT": str(self.ops_port),
            "SPOOL": str(self.spool),
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }

    async def ready(self, seconds: float = 90.0) -> None:
        """As every sidecar, with more patience: several of them start at once here."""
        await super().ready(seconds)

    async def drained(self, seconds: float = 90.0) -> None:
        """As every sidecar, with the same patience."""
        await super().drained(seconds)

    async def exit_code(self, seconds: float = 90.0) -> int:
        """As every sidecar, with the same patience."""
        return await super().exit_code(seconds)

    def configure(self, **changes: Any) -> None:
        """Nothing is written but by :meth:`apply`."""

    def apply(self, text: str | bytes) -> None:
        """The ConfigMap with this config.yaml has reached this pod."""
        self.volume.project({"config.yaml": text.encode() if isinstance(text, str) else text})


def config(phase: str, pg: Any, ddb: Any, *, port: int = 0, url: str = "", more: str = "") -> str:
    """The config.yaml that all pods get; ``port`` and ``url`` lead through a proxy."""
    password = pg.password.reveal() if pg.password else ""
    return CONFIG.format(
        phase=phase, pg=pg, ddb=ddb, port=port or pg.port, url=url or ddb.endpoint_url, more=more, password=password
    )


def live_frames(log: Path) -> list[int]:
    """Where the frames of SQLite's log begin that count: those from its start on that carry the salt of its head."""
    data = log.read_bytes()
    if len(data) < 32:
        return []
    page, salt = int.from_bytes(data[8:12], "big"), data[16:24]
    starts = range(32, len(data) - page - 23, page + 24)
    return list(itertools.takewhile(lambda start: data[start + 8 : start + 16] == salt, starts))


def flip_a_bit(path: Path, offset: int) -> None:
    """Damage one bit of a file, as a bad disk does."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))
