"""What the rows share; what ran, with which seed and counts, at the end; what did not run, by name."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import rows
from tests.faults.disk import Disk, made
from tests.faults.rows import Row
from tests.scenarios.conftest import http, stand  # noqa: F401  (the stand of the scenarios, as fixtures)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without root, rows that need it are named as not run; in CI they fail where root or a tool is missing."""
    for item in items:
        if item.get_closest_marker("root") and os.geteuid() != 0 and not os.environ.get("CI"):
            item.add_marker(pytest.mark.skip(reason="not run: needs root"))
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(7200 if rows.is_long() else 600))  # a busy machine is slow, not wrong


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: "pytest.CallInfo[None]"):
    """A row that failed shows the end of its sidecars' logs: a run in CI leaves nothing else to look at."""
    report = yield
    if report.when == "call" and report.failed:
        stand_of_it = getattr(item, "funcargs", {}).get("stand")
        for sidecar in stand_of_it.made if stand_of_it is not None else ():
            report.sections.append((f"log of {sidecar.base.name}", sidecar.tail()))
    return report


@pytest.fixture
def begin(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Callable[[str], Row]:
    """Begin a row: its seed is printed, its history kept."""

    def started(name: str) -> Row:
        row = rows.begin(name, request.node.name.removeprefix("test_"))
        record_property("row", f"{name}  seed {row.seed}  rounds {row.rounds}  {request.node.name}")
        return row

    return started


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A mounted ext4 of our own."""
    with made(tmp_path) as one:
        yield one


def pytest_terminal_summary(terminalreporter: "pytest.TerminalReporter") -> None:
    """One line a row: seed, rounds, outcome, seconds."""
    lines = [
        f"{value}  {outcome}  {report.duration:.0f} s"
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, ())
        if report.when == "call"
        for key, value in report.user_properties
        if key == "row"
    ]
    if lines:
        terminalreporter.section("fault matrix")
        for line in sorted(lines, key=lambda text: int(text[1:].split()[0])):
            terminalreporter.line(line)
