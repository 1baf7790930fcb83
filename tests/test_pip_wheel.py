"""How pip is fetched on a machine without it: newest that fits, from the configured index, hash checked."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "pip_wheel.py"
WHEEL = b"not really a wheel; only its hash matters here"
GOOD = hashlib.sha256(WHEEL).hexdigest()


class Index:
    """A package index on loopback whose one page the test writes."""

    def __init__(self) -> None:
        self.page = ""
        self.authorizations: list[str | None] = []
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.authorizations.append(self.headers.get("Authorization"))
                body = index.page.encode() if self.path == "/simple/pip/" else WHEEL
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_args: object) -> None:
                """Quiet."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def url(self, user: str = "") -> str:
        return f"http://{user}127.0.0.1:{self.server.server_port}/simple"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def index():
    """An index that is gone after the test."""
    started = Index()
    yield started
    started.close()


def fetch(directory: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the script as .ci/venv does, with no configuration of pip but the given one."""
    clean = {n: v for n, v in os.environ.items() if not n.startswith("PIP_") and not n.lower().endswith("_proxy")}
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(directory)],
        env=clean | {"HOME": str(directory)} | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def link(version: str, digest: str = GOOD, extra: str = "") -> str:
    """One line of an index page."""
    name = f"pip-{version}-py3-none-any.whl"
    return f'<a href="../../files/{name}#sha256={digest}"{extra}>{name}</a>\n'


def test_newest_wheel_that_fits_is_fetched(index, tmp_path):
    """Numbers are compared as numbers; a yanked one, a pre-release and one for a later Python are passed over."""
    index.page = "".join(
        (
            link("9.0.3"),
            link("25.10"),
            link("25.9"),
            link("26.0b1"),
            link("27.0", extra=' data-requires-python="&gt;=3.99"'),
            link("26.0", extra=' data-yanked=""'),
        )
    )
    done = fetch(tmp_path, PIP_INDEX_URL=index.url(), PIP_FIND_LINKS=str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/pip-25.10-py3-none-any.whl\n")
    assert (tmp_path / "pip-25.10-py3-none-any.whl").read_bytes() == WHEEL


@pytest.mark.parametrize("digest", ["0" * 64, ""])
def test_wrong_or_missing_hash_is_refused(index, tmp_path, digest):
    """A wheel that is not the one that the index states is not kept, and not run."""
    index.page = link("25.0", digest)
    done = fetch(tmp_path, PIP_INDEX_URL=index.url(), PIP_FIND_LINKS=str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "SHA-256" in done.stderr
    assert list(tmp_path.glob("*.whl")) == []


def test_user_of_the_index_url_is_sent_as_authorisation(index, tmp_path):
    """Private mirrors with a user and a password in the URL work, and the password is not printed."""
    index.page = link("25.0")
    done = fetch(tmp_path, PIP_INDEX_URL=index.url("u:s3cret@"), PIP_FIND_LINKS=str(tmp_path / "none"))
    assert done.returncode == 0
    assert index.authorizations[0] == "Basic dTpzM2NyZXQ="
    assert "s3cret" not in done.stdout + done.stderr


def test_local_wheel_is_taken_without_the_network(tmp_path):
    """A directory of find-links is enough."""
    wheel = tmp_path / "pip-25.1-py3-none-any.whl"
    wheel.write_bytes(WHEEL)
    done = fetch(tmp_path, PIP_FIND_LINKS=str(tmp_path), PIP_INDEX_URL="http://127.0.0.1:9/simple")
    assert done.stdout == f"{wheel}\n"


def test_index_without_pip_is_one_line(index, tmp_path):
    """An index that has none says so and fails."""
    done = fetch(tmp_path, PIP_INDEX_URL=index.url(), PIP_FIND_LINKS=str(tmp_path / "none"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
