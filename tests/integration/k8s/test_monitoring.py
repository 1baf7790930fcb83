"""Rules and dashboard: current, valid, about metrics that exist, explained in the runbook."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from k8s.monitoring import alerts, dashboard, panels
from k8s.monitoring.__main__ import RUNBOOK, TARGET, prometheus_rule, rule_file
from k8s.monitoring.promql import PHASES, Scale, duration
from sidecar import gates
from sidecar.__main__ import VERBS, build_parser
from sidecar.metrics import OBSERVATIONS, Metrics
from sidecar.phase import Phase
from tests.integration.k8s.faults import CASES, Case
from tests.integration.k8s.tools import ROOT, of_kind, render, run, tool

TYPES = ROOT / ".run" / "grafana-types"
HERE = Path(__file__).resolve().parent


def runbook() -> str:
    """The text that the alerts lead to."""
    return (ROOT / "docs" / "RUNBOOK.md").read_text()


def expressions() -> Iterator[str]:
    """Every expression of the dashboard and of the rules."""
    yield from (query.expr for _, query in panels.queries())
    yield from (alert.expr for alert in alerts.alerts(Scale()))


def metrics_named(expression: str) -> set[str]:
    """The sidecar's metrics in an expression, without prefix and without the endings of a histogram."""
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bsidecar_(\w+)", expression)}


def metrics_existing() -> set[str]:
    """The names that the sidecar exports, without prefix."""
    registry = CollectorRegistry()
    Metrics(registry)
    events = {
        family.name.removeprefix("sidecar_") + ("_total" if family.type == "counter" else "")
        for family in registry.collect()
        if family.name.startswith("sidecar_")
    }
    return events | set(OBSERVATIONS)


def test_the_committed_files_are_what_the_code_writes():
    """Nobody edits the rule file or the dashboard by hand, and nobody forgets to write them anew."""
    assert (TARGET / "prometheusrule.yaml").read_text() == prometheus_rule(RUNBOOK)
    assert (TARGET / "dashboard.json").read_text() == dashboard.build()


def test_every_metric_that_is_asked_for_exists():
    """No rule and no panel names a metric that nobody exports."""
    named = set().union(*(metrics_named(e) for e in expressions()))
    assert named - metrics_existing() == set()


def test_the_phases_stand_in_the_order_of_their_numbers():
    """The dashboard's 0 to 3 are the sidecar's."""
    assert [phase.label for phase in sorted(Phase)] == list(PHASES)


def test_promtool_accepts_the_rules(tmp_path: Path):
    """At every scale that is used."""
    for factor in (1.0, 0.01):
        path = tmp_path / "rules.yaml"
        path.write_text(rule_file(Scale(factor)))
        assert "SUCCESS" in run([tool("promtool"), "check", "rules", str(path)])


def test_every_alert_has_a_written_fault():
    """The table of faults and the table of alerts name the same alerts."""
    assert {case.alert for case in CASES} == {alert.name for alert in alerts.alerts(Scale())}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_an_alert_fires_and_clears_at_its_real_durations(case: Case, tmp_path: Path):
    """Promtool replays a written fault: silent while it is younger than the alert's patience, firing, silent after."""
    (tmp_path / "rules.yaml").write_text(rule_file(Scale()))
    (tmp_path / "test.yaml").write_text(json.dumps(case.promtool()))
    run([tool("promtool"), "test", "rules", "test.yaml"], cwd=tmp_path)


@pytest.mark.parametrize("moment", range(3))
def test_a_written_fault_can_fail(moment: int, tmp_path: Path):
    """A wrong expectation of any of the three moments is found."""
    (tmp_path / "rules.yaml").write_text(rule_file(Scale()))
    wrong = CASES[0].promtool()
    check = wrong["tests"][0]["promql_expr_test"][moment]
    check["exp_samples"] = [] if check["exp_samples"] else [{"labels": "{}", "value": 1}]
    (tmp_path / "test.yaml").write_text(json.dumps(wrong))
    with pytest.raises(AssertionError, match="FAILED"):
        run([tool("promtool"), "test", "rules", "test.yaml"], cwd=tmp_path)


def test_every_alert_has_its_section_in_the_runbook_and_every_section_its_alert():
    """The runbook's link of an alert leads to a heading of docs/RUNBOOK.md with that very name."""
    text = runbook()
    headings = re.findall(r"^### (Sidecar\w+)$", text, re.MULTILINE)
    assert len(headings) == len(set(headings))
    assert set(headings) == {alert.name for alert in alerts.alerts(Scale())}
    for alert in alerts.alerts(Scale()):
        assert alerts.rule(alert)["annotations"]["runbook_url"].endswith(f"docs/RUNBOOK.md#{alert.name.lower()}")


def test_an_alerts_section_says_what_it_means_and_what_to_do():
    """Meaning, look and act, for each; a section that only exists helps nobody at night."""
    text = runbook()
    for tail in re.split(r"^### (?=Sidecar)", text, flags=re.MULTILINE)[1:]:
        section = re.split(r"^#{1,3} ", tail, flags=re.MULTILINE)[0]
        for part in ("**Means**", "**Look**", "**Act**"):
            assert part in section, section.splitlines()[0]


def test_the_dashboard_has_grafanas_types(tmp_path: Path):
    """The type checker of Grafana's own schema package finds nothing, unknown members included."""
    assert TYPES.exists(), "Grafana's types are missing: run tests/integration/k8s/install"
    source = TYPES / "dashboard.ts"
    text = (HERE / "grafana" / "check.ts.in").read_text() + (TARGET / "dashboard.json").read_text()
    source.write_text(text)
    command = ["node_modules/.bin/tsc", "--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext"]
    run([*command, "dashboard.ts"], cwd=TYPES)
    source.write_text(text.replace('"title": "Accepted"', '"titel": "Accepted"'))
    with pytest.raises(AssertionError, match="titel"):
        run([*command, "dashboard.ts"], cwd=TYPES)


def test_the_dashboard_has_its_variables_and_every_panel_uses_them():
    """Namespace, app and pod narrow every panel."""
    board = json.loads((TARGET / "dashboard.json").read_text())
    assert [v["name"] for v in board["templating"]["list"]] == ["datasource", "namespace", "app", "pod"]
    for title, query in panels.queries():
        assert panels.FILTER in query.expr, title


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (0.25, "250ms"), (90, "90s"), (120, "2m"), (3600, "1h"), (604800, "7d")]
)
def test_a_duration_reads_as_prometheus_writes_it(seconds, text):
    """The largest unit that divides it."""
    assert duration(seconds) == text


def test_a_scaled_window_never_holds_too_few_scrapes():
    """The shortest window bounds ranges and offsets, not thresholds and not `for`."""
    scale = Scale(0.001, shortest_window=8)
    assert scale.window(900) == "8s"
    assert scale.hold(900) == "900ms"
    assert scale.seconds(900) == "0.9"


def test_a_scaled_week_can_be_cut_to_what_a_run_can_wait_for():
    """The longest bounds windows and `for`, no threshold; the shortest window still stands."""
    scale = Scale(0.001, shortest_window=8, longest=10)
    assert (scale.seconds(604_800), scale.window(604_800), scale.hold(604_800)) == ("604.8", "10s", "10s")
    assert (scale.seconds(900), scale.window(900), scale.hold(900)) == ("0.9", "8s", "900ms")


WORDS = {"PHASE": "dual_write", "TEXT": "why", "LOG_ID": "018f0000-0000-7000-8000-000000000000"}
"""What stands for a value in a command line of the runbook; FILE, DIR and POD are as good as any."""


def commands(text: str) -> list[str]:
    """Every command line of ours in the text, as an operator would complete it."""
    fence = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", fence.sub("", text).replace("\n", " "))
    spans += "\n".join(fence.findall(text)).splitlines()
    found = [re.search(r"^(?:kubectl [^|]*? -- )?sidecar ([a-z][a-z-]*(?: .*)?)$", span) for span in spans]
    return [match[1] for match in found if match]


def test_every_command_of_the_runbook_is_understood():
    """Whoever copies one at night must not meet `invalid choice` or a missing argument."""
    found = commands(runbook())
    for line in found:
        words = [WORDS.get(word, word) for word in shlex.split(line)]
        try:
            build_parser(VERBS).parse_args(words)
        except SystemExit:
            pytest.fail(f"sidecar {line}")
    assert {"validate", "backfill", "dead-letter", "phase", "drain", "fleet"} <= {line.split()[0] for line in found}
    with pytest.raises(SystemExit):  # and it can fail
        build_parser(VERBS).parse_args(shlex.split(commands("`sidecar phase set PHASE`")[0]))


def test_what_the_runbook_changes_in_a_job_is_there_to_be_changed():
    """Each `sed` finds its text once in what it is given, and what comes out is a command line that is understood."""
    found = re.findall(
        r"kubectl (?:kustomize k8s/(\S+)|.*cronjob/sidecar-(\w+) .*)[|\s]+sed 's/(\S+)/(\S+)/'", runbook()
    )
    assert len(found) == 2
    for folder, cron, old, new in found:
        jobs = of_kind(render(folder or f"jobs/{cron}"), "Job", "CronJob")
        (spec,) = (job["spec"].get("jobTemplate", job)["spec"] for job in jobs)
        args = spec["template"]["spec"]["containers"][0]["args"]
        assert args.count(old) == 1
        build_parser(VERBS).parse_args([new if word == old else word for word in args])


def test_every_address_of_the_runbook_is_a_route():
    """On the application's listener by the published description, on the ops listener by its four paths."""
    known = set(json.loads((ROOT / "sidecar" / "api" / "openapi.json").read_text())["paths"])
    text = runbook()
    named = set(re.findall(r"localhost:8080(/[\w/-]*)", text)) | set(re.findall(r"`(?:GET|POST) (/[\w/-]+)", text))
    shapes = {re.sub(r"\{\w+\}", "LOG_ID", path) for path in known}
    assert named - shapes == set()
    assert "/api/migration/history" in named
    assert set(re.findall(r"localhost:9464(/\w+)", text)) <= {"/metrics", "/livez", "/readyz", "/healthz"}


def test_every_gate_is_in_the_runbook():
    """By the name that `sidecar phase plan` shows."""
    assert [name for name in gates.NAMES if f"`{name}`" not in runbook()] == []


def test_the_runbook_names_panels_and_files_that_exist():
    """A panel in italics is on the dashboard, a linked file is in the repository."""
    titles = {panel.title for row in panels.ROWS for panel in row.panels} | {"Hybrid log sidecar: the migration"}
    italics = set(re.findall(r"(?<![*\w])\*([A-Z][^*\n]+)\*(?!\*)", runbook().replace("\n", " ")))
    assert italics - titles == set()
    for link in re.findall(r"\]\(\.\./([^)]+)\)", runbook()) + re.findall(r"`(k8s/[\w./-]+)`", runbook()):
        assert (ROOT / link).exists(), link
