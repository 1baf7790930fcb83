"""A real Prometheus watches real sidecars through faults: every panel has data, every alert fires and clears."""

import asyncio
import json
import math
import re
from pathlib import Path

import pytest

from k8s.monitoring import alerts, panels
from k8s.monitoring.promql import Scale
from sidecar import settings
from tests.integration.k8s.script import PLANS, scripted
from tests.integration.k8s.tools import ROOT, run, tool
from tests.integration.k8s.watching import Application, Recording, Watch, save
from tests.parts.postgres import connect

pytestmark = pytest.mark.timeout(900)  # seconds; the run is the fixture of whichever test comes first


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory, postgres_server, dynamodb_server) -> Recording:
    """The one run of this module; each application on tables that ``sidecar init-stores`` made."""
    return asyncio.run(_watched(tmp_path_factory.mktemp("watching"), postgres_server, dynamodb_server))


async def _watched(base: Path, server, endpoint: str) -> Recording:
    applications = {}
    admin = await connect(server.settings())
    try:
        for name, plan in PLANS.items():
            await admin.execute(f'CREATE DATABASE "watching_{name}" STRATEGY = file_copy')
            (base / name).mkdir()
            ddb = settings.DynamoDB(
                table=f"watching_{name}",
                fleet_table=f"watching_{name}_fleet",
                region="eu-central-1",
                endpoint_url=endpoint,
            )
            applications[name] = Application(base / name, plan, server.settings(f"watching_{name}"), ddb)
    finally:
        await admin.close(timeout=5)
    await asyncio.gather(*(each.init_stores() for each in applications.values()))
    return await Watch(base, applications).run()


@pytest.mark.parametrize("alert", sorted(scripted()))
def test_an_alert_fires_in_its_fault_and_clears_after_it(recording: Recording, alert: str):
    """Live, with the durations shortened by the generator that writes the real ones."""
    told = "\n".join([recording.script[alert], *recording.timeline])
    assert alert in recording.fired, told
    assert alert in recording.cleared, told


def test_every_alert_is_in_the_script():
    """An alert that comes to be must come to have its fault."""
    assert scripted() == {alert.name for alert in alerts.alerts(Scale())}


def test_no_alert_fires_while_nothing_is_wrong(recording: Recording):
    """Before the first fault and after the last."""
    assert recording.false_alarms == set(), "\n".join(recording.timeline)


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
