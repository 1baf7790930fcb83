"""A real Prometheus watches real sidecars through faults: every panel has data, every alert fires and clears."""

import asyncio
import json
import math
import os
import re
import sys

import pytest

from k8s.monitoring import alerts, panels
from k8s.monitoring.promql import Scale
from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.gaps import GapLine
from sidecar.stores.postgres import PostgresStore
from tests.integration.k8s.kubelet import Pod, config
from tests.integration.k8s.tools import ROOT, run, tool
from tests.integration.k8s.watching import SCRIPT, Recording, save, watched
from tests.parts.postgres import connect

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(900),  # the run is the fixture of whichever test comes first
]

# Alerts that no fault of this run can raise; promtool covers them at their real durations.
NOT_PLAYED = {
    "SidecarIdentityBroken": "tells of a bug",
    "SidecarShipperRestarted": "tells of a bug",
    "SidecarGapReleased": "only a backfill closes the gap, and the run goes on after it",
    "SidecarGapOpen": "its week is more than half an hour of the run",
    "SidecarValidationStale": "its day is five minutes of the run",
}


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory, postgres_server, dynamodb_server) -> Recording:
    """The one run of this module, on tables that ``sidecar init-stores`` made."""
    base = tmp_path_factory.mktemp("watching")
    asyncio.run(_database(postgres_server))
    pg = postgres_server.settings("watching")
    ddb = settings.DynamoDB(
        table="watching", fleet_table="watching_fleet", region="eu-central-1", endpoint_url=dynamodb_server
    )
    pod = Pod(base / "init")
    pod.apply(config("dual_write", pg, ddb))
    init = [sys.executable, "-m", "sidecar", "init-stores", "--config", str(pod.volume.directory / "config.yaml")]
    run(init, env={**os.environ, **pod.environ}, cwd=ROOT)
    asyncio.run(_history_is_missing(pg))
    return asyncio.run(watched(base, pg, ddb))


async def _database(server) -> None:
    connection = await connect(server.settings())
    try:
        await connection.execute("CREATE DATABASE watching STRATEGY = file_copy")
    finally:
        await connection.close(timeout=5)


async def _history_is_missing(pg: settings.Postgres) -> None:
    """An open gap, as before a backfill: the ledger says so to every sidecar that starts."""
    store = PostgresStore(pg, clock=SystemClock())
    try:
        await store.gap_ledger.put_gaps(
            [GapLine(store="dynamodb", kind="history", hour=490_000, source="fleet", opened=4)]
        )
    finally:
        await store.close()


@pytest.mark.parametrize("alert", sorted(set().union(*(names for _, names in SCRIPT))))
def test_an_alert_fires_in_its_fault_and_clears_after_it(recording: Recording, alert: str):
    """Live, with the durations shortened by the generator that writes the real ones."""
    assert alert in recording.fired, recording.script[alert]
    assert alert in recording.cleared, recording.script[alert]


def test_every_alert_is_in_the_script_or_cannot_be_and_says_why():
    """An alert that comes to have its metric must come to have its fault."""
    scripted = set().union(*(names for _, names in SCRIPT))
    assert scripted | set(NOT_PLAYED) == {alert.name for alert in alerts.alerts(Scale())}
    assert not scripted & set(NOT_PLAYED)


def test_no_alert_fires_while_nothing_is_wrong(recording: Recording):
    """Before the first fault and after the last."""
    assert recording.false_alarms == set()


@pytest.mark.parametrize("title", sorted({title for title, _ in panels.queries()}))
def test_every_expression_of_a_panel_returns_data(recording: Recording, title: str):
    """On a real Prometheus, over the run."""
    for name, query in panels.queries():
        if name == title:
            values = [float(v) for series in recording.answers[query.expr] for _, v in series["values"]]
            # a quantile of a histogram in which nothing was ever observed is there, and is not a number
            assert any(math.isfinite(v) for v in values), query.expr


def test_the_identity_holds_at_every_scrape_of_every_fault(recording: Recording):
    """Owed = delivered + pending + dead + released + discarded + quarantined, always."""
    assert recording.identity
    values = {float(value) for series in recording.identity for _, value in series["values"]}
    assert values == {0.0}
    assert "SidecarIdentityBroken" not in recording.fired


def test_promtool_finds_nothing_in_the_metrics(recording: Recording):
    """Names, units, help and types as the field's conventions want them."""
    assert run([tool("promtool"), "check", "metrics"], input=recording.metrics_text) == ""
    assert len(re.findall(r"^# TYPE sidecar_", recording.metrics_text, re.MULTILINE)) > 30


def test_the_sidecars_role_allows_every_operation_that_they_made(recording: Recording):
    """Nothing in the run needed a right that k8s/iam/sidecar-policy.json does not give."""
    policy = json.loads((ROOT / "k8s" / "iam" / "sidecar-policy.json").read_text())
    actions = [s["Action"] for s in policy["Statement"]]
    allowed = {a for given in actions for a in ([given] if isinstance(given, str) else given)}
    assert "BatchWriteItem" in recording.dynamodb_operations
    assert {f"dynamodb:{name}" for name in recording.dynamodb_operations} <= allowed


def test_the_run_is_kept_for_the_picture(recording: Recording):
    """What the panels showed can be drawn."""
    save(recording, ROOT / ".run" / "recorded-run.json")
