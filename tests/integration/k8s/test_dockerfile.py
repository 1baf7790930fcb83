"""The Dockerfile and what it installs: linted, locked, and to be had for every machine."""

import os
import re
import sys
from pathlib import Path

import pytest

from tests.integration.k8s.tools import ROOT, TOOLS, run, tool


def test_hadolint_finds_nothing():
    """Not one finding, and none is switched off."""
    run([tool("hadolint"), "--failure-threshold", "style", str(ROOT / "Dockerfile")])
    assert "hadolint ignore" not in (ROOT / "Dockerfile").read_text()


def test_the_locked_requirements_are_those_of_the_project():
    """Whoever changes a dependency writes the lock anew, or this fails."""
    run([str(ROOT / "k8s" / "lock"), "--check"], env=os.environ | {"PATH": f"{TOOLS}/bin:{os.environ['PATH']}"})


def wheels(requirements: Path, target: Path, version: str, machine: str) -> None:
    """Fails where a requirement has no wheel for that Python and machine, or none with a listed hash."""
    platforms = [f"--platform=manylinux{tag}_{machine}" for tag in ("2014", "_2_17", "_2_28")]
    command = ["-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    wanted = ["--target", str(target), "--python-version", version, "--only-binary", ":all:", "--require-hashes"]
    run([sys.executable, *command, *wanted, *platforms, "-r", str(requirements)])


@pytest.mark.parametrize(("version", "machine"), [("3.12", "aarch64"), ("3.13", "x86_64")])
def test_every_locked_package_has_a_wheel_with_a_listed_hash(version, machine, tmp_path: Path):
    """No compiler in any image, whatever the architecture; this machine's Python is seen in the replay of the image."""
    wheels(ROOT / "requirements.txt", tmp_path, version, machine)


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path):
    """The check above can fail."""
    wrong = re.sub("sha256:..", "sha256:00", (ROOT / "requirements.txt").read_text())
    (tmp_path / "wrong.txt").write_text(wrong)
    with pytest.raises(AssertionError, match="HASHES"):
        wheels(tmp_path / "wrong.txt", tmp_path, "3.13", "x86_64")
