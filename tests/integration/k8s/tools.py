"""The real tools, found or failed: a missing one is never a skipped test."""

import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[3]
TOOLS = ROOT / ".run" / "k8s-tools"
OVERLAYS = sorted(path.name for path in (ROOT / "k8s" / "overlays").iterdir())
JOBS = sorted(path.name for path in (ROOT / "k8s" / "jobs").iterdir()) if (ROOT / "k8s" / "jobs").exists() else []


def tool(name: str) -> str:
    """The path of a command; fails the test where it is missing."""
    found = shutil.which(name, path=f"{TOOLS}/bin") or shutil.which(name)
    assert found, f"{name} is missing: run tests/integration/k8s/install"
    return found


def run(command: Sequence[str], **more: Any) -> str:
    """Standard output and error of a command that must end with 0."""
    done = subprocess.run(
        command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, **more
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout


@cache
def _rendered(path: str) -> str:
    return run([tool("kubectl"), "kustomize", str(ROOT / "k8s" / path)])


def render(path: str) -> list[dict[str, Any]]:
    """What ``kubectl kustomize`` makes of a folder below k8s/; the caller's own copy."""
    return list(yaml.safe_load_all(_rendered(path)))


def of_kind(manifests: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    """The manifests of those kinds, in order."""
    return [m for m in manifests if m["kind"] in kinds]
