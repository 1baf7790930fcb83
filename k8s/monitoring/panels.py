"""Every panel of the dashboard as data: what it asks Prometheus, how it reads, in which row it stands.

One list serves four readers: the dashboard's builder, the test that runs every expression on a real Prometheus, the
test that every metric exists, and the picture in the docs. ``FILTER`` stands for the dashboard's variables.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from k8s.monitoring.promql import PHASES

FILTER: Final = 'namespace=~"$namespace",app=~"$app",pod=~"$pod"'
RATE: Final = "$__rate_interval"
STORES: Final = ("postgres", "dynamodb")

Kind = Literal["timeseries", "stat", "phases"]


@dataclass(frozen=True, slots=True)
class Query:
    """One expression and the name of its series."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    Attributes:
        title: what is shown.
        description: how to read it; the first thing that somebody at night needs.
        queries: what is asked.
        unit: Grafana's name of the unit.
        kind: a line over time, one number, or the phases as coloured bars.
        width: of 24 columns.
    """

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: Kind = "timeseries"
    width: int = 8


@dataclass(frozen=True, slots=True)
class Row:
    """A heading and its panels."""

    title: str
    panels: tuple[Panel, ...]


def queries() -> Iterator[tuple[str, Query]]:
    """Every expression of the dashboard with the title of its panel."""
    for row in ROWS:
        for panel in row.panels:
            for query in panel.queries:
                yield panel.title, query


def _gauge(name: str, by: str, how: str = "sum") -> str:
    return f"{how} by ({by}) ({name}{{{FILTER}}})"


def _rate(name: str, by: str) -> str:
    return f"sum by ({by}) (rate({name}{{{FILTER}}}[{RATE}]))"


def _quantile(q: float, name: str, by: str) -> str:
    return f"histogram_quantile({q}, sum by ({by}, le) (rate({name}_bucket{{{FILTER}}}[{RATE}])))"


def _phase_number(metric: str) -> str:
    return "max by (pod) (" + " or ".join(
        f'(({metric}{{phase="{name}",{FILTER}}} == 1) * {number})' for number, name in enumerate(PHASES)
    ) + ")"  # fmt: skip


def _age(timestamp: str) -> str:
    return f"time() - max by (namespace, app) ({timestamp}{{{FILTER}}} > 0)"


ROWS: Final[tuple[Row, ...]] = (
    Row(
        "Where the migration stands",
        (
            Panel(
                "Phase of each pod",
                "The applied phase. Two neighbours for a moment are a step under way; for long, a pod holds it up.",
                (Query(_phase_number("sidecar_phase"), "{{pod}}"),),
                kind="phases",
                width=12,
            ),
            Panel(
                "Phase that the configuration asks for",
                "Differs from the applied one while a gate is red: GET /status says which.",
                (Query(_phase_number("sidecar_desired_phase"), "{{pod}}"),),
                kind="phases",
                width=12,
            ),
            Panel(
                "Pods scraped",
                "Sidecars that answered the last scrape.",
                (Query('sum(up{job="hybrid-log-sidecar",' + FILTER + "})", "up"),),
                kind="stat",
                width=4,
            ),
            Panel(
                "Pending",
                "Records owed to a store and not there yet.",
                (Query(_gauge("sidecar_store_pending_records", "store"), "{{store}}"),),
                kind="stat",
                width=5,
            ),
            Panel(
                "Diverging",
                "Records confirmed in one owed store and not in the other.",
                (
                    Query(
                        _gauge("sidecar_divergence_records", "present_in, missing_from"),
                        "in {{present_in}}, not in {{missing_from}}",
                    ),
                ),
                kind="stat",
                width=5,
            ),
            Panel(
                "Dead letters",
                "Records that a store refused as data. They wait for a redrive or a discard.",
                (Query(_gauge("sidecar_dead_letter_records", "store"), "{{store}}"),),
                kind="stat",
                width=5,
            ),
            Panel(
                "Epoch of the phase",
                "Counts the steps. Pods with different epochs are in the middle of one.",
                (Query(_gauge("sidecar_phase_epoch", "namespace, app", "max"), "{{app}}"),),
                kind="stat",
                width=5,
            ),
        ),
    ),
    Row(
        "Records in",
        (
            Panel(
                "Accepted",
                "Records made durable and acknowledged, by phase.",
                (Query(_rate("sidecar_records_accepted_total", "phase"), "{{phase}}"),),
                "cps",
            ),
            Panel(
                "Refused at the door",
                "By reason, since each container's start. The application sent something that both stores cannot hold.",
                (Query(_gauge("sidecar_records_refused_total", "reason"), "{{reason}}"),),
            ),
            Panel(
                "Push-back",
                "1 while ingest answers 503, by reason.",
                (Query(_gauge("sidecar_backpressure_active", "pod, reason", "max"), "{{pod}} {{reason}}"),),
            ),
            Panel(
                "Answers by status",
                "All HTTP answers of the application listener.",
                (Query(_rate("sidecar_http_requests_total", "status"), "{{status}}"),),
                "reqps",
            ),
            Panel(
                "Time of a durable commit",
                "fsync included; every acknowledgement waits for one.",
                tuple(
                    Query(_quantile(q, "sidecar_spool_commit_seconds", "namespace, app"), f"p{q * 100:g}")
                    for q in (0.5, 0.99)
                ),
                "s",
            ),
            Panel(
                "Spool fill",
                "Share of the cap. Ingest pushes back above 90 % and takes again below 80 %.",
                (
                    Query(
                        f"max by (pod) (sidecar_spool_bytes{{{FILTER}}} / sidecar_spool_capacity_bytes{{{FILTER}}})",
                        "{{pod}}",
                    ),
                ),
                "percentunit",
            ),
        ),
    ),
    Row(
        "Delivery",
        (
            Panel(
                "Delivered",
                "Records confirmed by each store.",
                (Query(_rate("sidecar_store_records_delivered_total", "store"), "{{store}}"),),
                "cps",
            ),
            Panel(
                "Age of the oldest pending record",
                "Seconds when all is well. It grows by one second a second while a store is down.",
                (Query(_gauge("sidecar_store_oldest_pending_age_seconds", "store", "max"), "{{store}}"),),
                "s",
            ),
            Panel(
                "State of each store",
                "Pods by the state of their delivery: up, throttled, down, blocked, paused, waiting.",
                (Query(_gauge("sidecar_store_state", "store, state") + " > 0", "{{store}} {{state}}"),),
            ),
            Panel(
                "Time of a write call",
                "By store.",
                tuple(
                    Query(_quantile(q, "sidecar_store_write_seconds", "store"), "{{store}} p" + f"{q * 100:g}")
                    for q in (0.5, 0.99)
                ),
                "s",
            ),
            Panel(
                "Retries and throttles",
                "Write calls or records to try again, by store and class.",
                (Query(_rate("sidecar_store_retries_total", "store, class"), "{{store}} {{class}}"),),
                "cps",
            ),
            Panel(
                "Write calls that may be in flight",
                "The adaptive limit. It shrinks when a store throttles.",
                (Query(_gauge("sidecar_store_inflight_limit", "store"), "{{store}}"),),
            ),
            Panel(
                "Dead letters by reason",
                "By store and class.",
                (Query(_gauge("sidecar_dead_letter_records", "store, reason"), "{{store}} {{reason}}"),),
            ),
            Panel(
                "Pending bytes",
                "Stored size of what is still owed.",
                (Query(_gauge("sidecar_store_pending_bytes", "store"), "{{store}}"),),
                "bytes",
            ),
            Panel(
                "Consumed DynamoDB capacity",
                "Write units a second, by table and index.",
                (Query(_rate("sidecar_dynamodb_consumed_capacity_units_total", "target"), "{{target}}"),),
                "cps",
            ),
        ),
    ),
    Row(
        "Do the stores agree?",
        (
            Panel(
                "Divergence",
                "Records in one owed store and not in the other, from this fleet's own books.",
                (
                    Query(
                        _gauge("sidecar_divergence_records", "present_in, missing_from"),
                        "in {{present_in}}, not in {{missing_from}}",
                    ),
                ),
            ),
            Panel(
                "Age of the oldest divergence",
                "How long one record has been in one store only.",
                (Query(_gauge("sidecar_divergence_oldest_age_seconds", "namespace, app", "max"), "{{app}}"),),
                "s",
            ),
            Panel(
                "Differences found by the last validation",
                "By class. Only the unexplained ones keep a gate red.",
                (Query(_gauge("sidecar_divergence_at_rest_records", "class", "max"), "{{class}}"),),
            ),
            Panel(
                "Age of the last validation",
                "The last that completed, and the last that was clean.",
                (
                    Query(_age("sidecar_validation_last_success_timestamp_seconds"), "completed"),
                    Query(_age("sidecar_validation_last_clean_timestamp_seconds"), "clean"),
                ),
                "s",
            ),
            Panel(
                "Open gaps",
                "Records that a store was not owed, or that were released. Backfill closes them.",
                (Query(_gauge("sidecar_open_gap_records", "store, kind", "max"), "{{store}} {{kind}}"),),
            ),
            Panel(
                "Shadow reads",
                "Reads repeated on the other store, by result. Only `match`, `in_flight` and `expired` are as they"
                " should be, and `expected_gap` until the backfill.",
                (Query(_rate("sidecar_shadow_reads_total", "result"), "{{result}}"),),
                "cps",
            ),
            Panel(
                "Time of a read",
                "The 99th percentile by pattern and store.",
                (Query(_quantile(0.99, "sidecar_read_seconds", "pattern, store"), "{{pattern}} {{store}}"),),
                "s",
            ),
            Panel(
                "Identity",
                "owed - delivered - pending - dead - released - discarded - quarantined. Anything but 0 is a bug.",
                (
                    Query(
                        " - ".join(
                            _gauge(name, "store")
                            for name in (
                                "sidecar_store_records_owed_total",
                                "sidecar_store_records_delivered_total",
                                "sidecar_store_pending_records",
                                "sidecar_store_records_released_total",
                                "sidecar_store_records_discarded_total",
                                "sidecar_store_records_quarantined_total",
                            )
                        )
                        + f' - (sum by (store) (sidecar_dead_letter_records{{reason!="refused",{FILTER}}})'
                        f" or {_gauge('sidecar_store_records_owed_total', 'store')} * 0)",
                        "{{store}}",
                    ),
                ),
            ),
            Panel(
                "Released, discarded, quarantined",
                "Records that did not go the ordinary way; all on purpose, all recorded.",
                tuple(
                    Query(_gauge(f"sidecar_store_records_{what}_total", "store"), "{{store}} " + what)
                    for what in ("released", "discarded", "quarantined")
                ),
            ),
        ),
    ),
    Row(
        "Configuration and fleet",
        (
            Panel(
                "What holds a step",
                "Pods that say why the wanted phase is not in force yet. The runbook lists the gates by step.",
                (Query(_gauge("sidecar_phase_held", "gate"), "{{gate}}"),),
            ),
            Panel(
                "Fenced instances",
                "1: out of touch with the fleet. It accepts records, owed to be decided, and answers no read.",
                (Query(_gauge("sidecar_fleet_fenced", "pod", "max"), "{{pod}}"),),
            ),
            Panel(
                "Undecided records",
                "Accepted while fenced; who is owed them is decided when the pod is in touch again.",
                (Query(_gauge("sidecar_spool_undecided_records", "pod"), "{{pod}}"),),
            ),
            Panel(
                "Configuration accepted",
                "0: the mounted file was refused and the last good one is in force.",
                (Query(_gauge("sidecar_config_last_reload_successful", "pod", "max"), "{{pod}}"),),
            ),
            Panel(
                "Instances by state",
                "As the fleet's leader sees them. A silent one holds every step.",
                (Query(_gauge("sidecar_fleet_instances", "phase, state", "max"), "{{phase}} {{state}}"),),
            ),
            Panel(
                "Phase changes",
                "Steps made since each container's start, and whether they were made with phase_force.",
                (
                    Query(
                        _gauge("sidecar_phase_transitions_total", "from, to, forced"),
                        "{{from}} to {{to}}, forced {{forced}}",
                    ),
                ),
            ),
            Panel(
                "Undelivered at the last exit",
                "What the previous run left in the spool. On an emptyDir it is lost with the pod.",
                (Query(_gauge("sidecar_undelivered_at_exit", "store"), "{{store}}"),),
            ),
            Panel(
                "Free disk",
                "Of the spool's file system.",
                (Query(_gauge("sidecar_spool_free_disk_bytes", "pod", "min"), "{{pod}}"),),
                "bytes",
            ),
            Panel(
                "Distinct configurations",
                "More than one for long: a pod does not see the ConfigMap's changes.",
                (
                    Query(
                        "count by (namespace, app)"
                        f" (count by (namespace, app, hash) (sidecar_config_info{{{FILTER}}}))",
                        "{{app}}",
                    ),
                ),
            ),
        ),
    ),
)
