"""The command line: verbs, exit codes, one line per error. Run as a program where that is the fact."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sidecar import __main__ as cli
from sidecar import __version__, errors
from sidecar.errors import (
    Busy,
    ConfigError,
    RetryClass,
    SidecarError,
    SpoolFailed,
    SpoolLocked,
    SpoolRefused,
    StoreError,
)

ROOT = Path(__file__).parent.parent
CANARY = "canary-5ecret"


@pytest.fixture
def good(tmp_path):
    """A valid configuration with a secret in it."""
    path = tmp_path / "config.yaml"
    path.write_text(f"phase: dual_write\npostgres: {{password: {CANARY}}}\ndynamodb: {{region: eu-west-1}}\n")
    return path


def run(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """The program as a user starts it, with only the variables given."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SIDECAR", "AWS_"))}
    return subprocess.run(
        [sys.executable, "-m", "sidecar", *map(str, arguments)],
        cwd=ROOT,
        env=clean | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_version_is_the_packages():
    """``version`` prints the package's version and needs no configuration."""
    done = run("version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"sidecar {__version__}\n", "")


def test_validate_config_says_good_and_names_the_phase(good):
    """A good file: exit 0, phase and digest on stdout."""
    done = run("validate-config", "--config", good)
    assert done.returncode == 0
    assert "phase dual_write" in done.stdout
    assert done.stderr == ""


def test_validate_config_takes_the_path_from_the_environment(good):
    """SIDECAR_CONFIG is the default of --config."""
    assert run("validate-config", SIDECAR_CONFIG=str(good)).returncode == 0


def test_wrong_configuration_is_one_line_and_exit_2(good):
    """A bad value: exit 2, one line on stderr without a traceback, nothing on stdout."""
    good.write_text(good.read_text() + "retry: {attempts: many}\n")
    done = run("validate-config", "--config", good)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sidecar: retry.attempts: seen 'many'")
    assert done.stderr.count("\n") == 1


MORE_WORDS = {
    "phase": ["show"],
    "drain": ["--spool", "x"],
    "spool": ["ls"],
    "dead-letter": ["ls"],
    "store": ["pause", "postgres", "--why", "x"],
    "clear-dynamodb": ["--table", "x", "--why", "x"],
}


@pytest.mark.parametrize("verb", [verb.name for verb in cli.VERBS if verb.name not in ("version", "dev", "demo")])
def test_every_verb_with_a_configuration_refuses_a_missing_one_with_2(verb, tmp_path, capsys):
    """No verb starts anything where the configuration cannot be read."""
    words = [verb, *MORE_WORDS.get(verb, [])]
    assert cli.main([*words, "--config", str(tmp_path / "none.yaml")]) == 2
    assert "ENOENT" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["serve", "--nope"], ["version", "extra"], ["serve", "--conf", "x"]]
)
def test_usage_errors_exit_with_2(arguments, capsys):
    """An unknown verb, option or abbreviation is a usage error."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: sidecar" in capsys.readouterr().err


def test_print_config_masks_the_secret_and_reads_back(good, tmp_path):
    """What is printed holds every setting and no secret, and is itself a valid configuration."""
    done = run("print-config", "--config", good)
    assert done.returncode == 0
    assert "phase: dual_write" in done.stdout
    assert 'password: "***"' in done.stdout
    assert CANARY not in done.stdout + done.stderr
    printed = tmp_path / "printed.yaml"
    printed.write_text(done.stdout)
    assert run("print-config", "--config", printed).stdout == done.stdout


def test_warnings_go_to_stderr(good):
    """What wants attention is said on stderr and refuses nothing."""
    done = run("validate-config", "--config", good, SIDECAR__LISTEN__APP="0.0.0.0:8080")
    assert done.returncode == 0
    assert "sidecar: warning: listen.app" in done.stderr


def test_help_lists_every_verb():
    """--help shows each verb of the table with its line."""
    done = run("--help")
    assert done.returncode == 0
    for verb in cli.VERBS:
        assert verb.name in done.stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("phase", seen=9, allowed="0..3"), 2),
        (SpoolLocked("held"), 3),
        (SpoolRefused("tmpfs"), 3),
        (SpoolFailed("EIO"), 4),
        (StoreError("postgres", RetryClass.BLOCKED, "no table"), 5),
        (Busy("disk_full", "no room", 5), 1),
    ],
)
def test_each_error_has_its_exit_code(error, code, capsys):
    """Every branch of the error tree that ends a verb has the exit code that the module documents."""

    def fail(_args: argparse.Namespace) -> int:
        raise error

    verbs = [cli.Verb("fail", "fails", fail, lambda _parser: None)]
    assert cli.main(["fail"], verbs) == code
    assert capsys.readouterr().err == f"sidecar: {error}\n"


def test_exit_codes_are_documented_and_distinct_from_success():
    """Each code of the table stands in the module's text; no error exits with 0."""
    for code in {*cli.EXIT_CODES.values(), cli.EXIT_NEGATIVE, cli.EXIT_INTERRUPTED}:
        assert f"\n{code} " in (cli.__doc__ or "")
        assert code != 0
    assert all(issubclass(kind, SidecarError) and hasattr(errors, kind.__name__) for kind in cli.EXIT_CODES)


def test_interrupt_exits_with_130():
    """Ctrl-C is no traceback."""

    def interrupted(_args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    assert cli.main(["x"], [cli.Verb("x", "x", interrupted, lambda _parser: None)]) == 130


def test_validate_config_imports_no_driver(good):
    """The verbs that only read need neither drivers nor the HTTP server."""
    code = (
        "import sys; from sidecar.__main__ import main; code = main(sys.argv[1:]); "
        "sys.exit(code or any(m in sys.modules for m in ('asyncpg', 'aioboto3', 'botocore', 'aiohttp')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "validate-config", "--config", str(good)], cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == 0
