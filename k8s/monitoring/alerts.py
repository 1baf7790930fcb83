"""Every alert, once: what is wrong, how long it must last, how bad it is, and where the runbook says what to do.

Invariants, each with a test: an alert's name is a section of docs/RUNBOOK.md; its metrics exist in the sidecar; it
fires in a scripted fault and clears after it.

``critical`` wakes somebody: applications are pushed back, or what the sidecar promises is in doubt. ``warning`` is for
the working day: the migration does not go on, nothing is lost. ``info`` is for the record.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final, Literal

from k8s.monitoring.promql import APP, JOB, PHASES, POD, Scale, counted, grown

RUNBOOK: Final = "https://github.com/example/hybrid-log-sidecar/blob/main/docs/RUNBOOK.md"

MINUTE: Final = 60.0
HOUR: Final = 3600.0
DAY: Final = 86_400.0

AT_APP: Final = "{{ $labels.namespace }}/{{ $labels.app }}"
AT_POD: Final = "{{ $labels.namespace }}/{{ $labels.pod }}"

Severity = Literal["critical", "warning", "info"]


@dataclass(frozen=True, slots=True)
class Alert:
    """One alerting rule.

    Attributes:
        name: also the heading of its section in the runbook.
        group: which concern it belongs to.
        expr: PromQL, scaled.
        hold: ``for``, scaled.
        severity: who is told.
        summary: one line with the labels that say where.
    """

    name: str
    group: str
    expr: str
    hold: str
    severity: Severity
    summary: str


def alerts(scale: Scale) -> tuple[Alert, ...]:
    """All alerts with their durations at that scale."""
    return (*_ingest(scale), *_delivery(scale), *_phases(scale), *_consistency(scale))


def rule(alert: Alert, runbook: str = RUNBOOK) -> Mapping[str, Any]:
    """The alert as Prometheus reads it."""
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": alert.hold,
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.summary, "runbook_url": f"{runbook}#{alert.name.lower()}"},
    }


def groups(scale: Scale, runbook: str = RUNBOOK) -> dict[str, Any]:
    """The body of a rule file, and of a PrometheusRule's ``spec``."""
    table: dict[str, list[Mapping[str, Any]]] = {}
    for alert in alerts(scale):
        table.setdefault(alert.group, []).append(rule(alert, runbook))
    return {"groups": [{"name": f"{JOB}.{name}", "rules": rules} for name, rules in table.items()]}


def _ingest(s: Scale) -> tuple[Alert, ...]:
    return (
        Alert(
            "SidecarDown",
            "ingest",
            f'up{{job="{JOB}"}} == 0',
            s.hold(2 * MINUTE),
            "critical",
            f"{AT_POD}: the sidecar cannot be scraped; its application may get no answer",
        ),
        Alert(
            "SidecarBackPressure",
            "ingest",
            f"max by ({POD}, reason) (sidecar_backpressure_active) == 1",
            s.hold(MINUTE),
            "critical",
            f"{AT_POD}: ingest answers 503 ({{{{ $labels.reason }}}}); the application must hold its records",
        ),
        Alert(
            "SidecarSpoolNearCap",
            "ingest",
            f"max by ({POD}) (sidecar_spool_bytes / sidecar_spool_capacity_bytes) > 0.7",
            s.hold(5 * MINUTE),
            "warning",
            f"{AT_POD}: the spool is {{{{ $value | humanizePercentage }}}} full; it pushes back at 90 %",
        ),
        Alert(
            "SidecarSpoolFullSoon",
            "ingest",
            f"max by ({POD}) (predict_linear(sidecar_spool_bytes[{s.window(30 * MINUTE)}], {s.seconds(4 * HOUR)})"
            " / sidecar_spool_capacity_bytes) > 0.9"
            f" and max by ({POD}) (sidecar_spool_bytes / sidecar_spool_capacity_bytes) > 0.1",
            s.hold(15 * MINUTE),
            "warning",
            f"{AT_POD}: at this rate the spool is full within four hours",
        ),
        Alert(
            "SidecarSpoolDamaged",
            "ingest",
            f"({grown('sidecar_spool_quarantined_records_total', POD, s.window(HOUR))})"
            f" or ({grown('sidecar_spool_wal_damage_total', POD, s.window(HOUR))})",
            s.hold(0),
            "critical",
            f"{AT_POD}: damaged bytes were found in the spool and put aside",
        ),
        Alert(
            "SidecarSlowCommits",
            "ingest",
            f"histogram_quantile(0.99, sum by ({POD}, le)"
            f" (rate(sidecar_spool_commit_seconds_bucket[{s.window(5 * MINUTE)}]))) > 0.25",
            s.hold(15 * MINUTE),
            "warning",
            f"{AT_POD}: p99 of a commit is {{{{ $value | humanizeDuration }}}}; every answer waits for it",
        ),
        Alert(
            "SidecarRecordsRefused",
            "ingest",
            counted("sidecar_records_refused_total", f"{APP}, reason", s.window(15 * MINUTE)),
            s.hold(0),
            "info",
            f"{AT_APP}: records refused at the door ({{{{ $labels.reason }}}})",
        ),
    )


def _delivery(s: Scale) -> tuple[Alert, ...]:
    where = f"{AT_APP}: {{{{ $labels.store }}}}"
    identity = " - ".join(
        f"sum by ({POD}, store) ({metric})"
        for metric in (
            "sidecar_store_records_owed_total",
            "sidecar_store_records_delivered_total",
            "sidecar_store_pending_records",
            "sidecar_store_records_released_total",
            "sidecar_store_records_discarded_total",
            "sidecar_store_records_quarantined_total",
        )
    )
    dead = (
        f'(sum by ({POD}, store) (sidecar_dead_letter_records{{reason!="refused"}})'
        f" or sum by ({POD}, store) (sidecar_store_records_owed_total) * 0)"
    )
    return (
        Alert(
            "SidecarStoreBlocked",
            "delivery",
            f'max by ({APP}, store) (sidecar_store_state{{state="blocked"}}) == 1',
            s.hold(MINUTE),
            "critical",
            f"{where} refuses everything (permission, table, schema); nothing is delivered until it is mended",
        ),
        Alert(
            "SidecarPendingAge",
            "delivery",
            f"max by ({APP}, store) (sidecar_store_oldest_pending_age_seconds) > {s.seconds(5 * MINUTE)}",
            s.hold(2 * MINUTE),
            "warning",
            f"{where}: the oldest record waits for {{{{ $value | humanizeDuration }}}}",
        ),
        Alert(
            "SidecarThrottled",
            "delivery",
            f"sum by ({APP}, store)"
            f' (rate(sidecar_store_retries_total{{class="throttle"}}[{s.window(15 * MINUTE)}])) > 0.5',
            s.hold(30 * MINUTE),
            "warning",
            f"{where} throttles the writes; capacity is short",
        ),
        Alert(
            "SidecarDeadLetters",
            "delivery",
            f'sum by ({APP}, store, reason) (sidecar_dead_letter_records{{reason!="refused"}}) > 0',
            s.hold(0),
            "warning",
            f"{where}: {{{{ $value }}}} dead letters ({{{{ $labels.reason }}}})",
        ),
        Alert(
            "SidecarShipperRestarted",
            "delivery",
            counted("sidecar_shipper_restarts_total", f"{POD}, store", s.window(15 * MINUTE)),
            s.hold(0),
            "warning",
            f"{AT_POD}: the delivery task of {{{{ $labels.store }}}} died and was started again",
        ),
        Alert(
            "SidecarIdentityBroken",
            "delivery",
            f"({identity} - {dead}) != 0",
            s.hold(MINUTE),
            "critical",
            f"{AT_POD}: {{{{ $value }}}} records of {{{{ $labels.store }}}} are unaccounted for",
        ),
    )


def _phases(s: Scale) -> tuple[Alert, ...]:
    in_phase = [f'count by ({APP}) (sidecar_phase{{phase="{phase}"}} == 1)' for phase in PHASES]
    apart = [(a, b) for a, b in combinations(in_phase, 2) if in_phase.index(b) - in_phase.index(a) > 1]
    return (
        Alert(
            "SidecarPhaseHeld",
            "phase",
            f"(max by ({POD}, phase) (sidecar_desired_phase) == 1)"
            f" unless on ({POD}, phase) (max by ({POD}, phase) (sidecar_phase) == 1)",
            s.hold(15 * MINUTE),
            "warning",
            f"{AT_POD}: asked for {{{{ $labels.phase }}}}, not there yet; /status says why",
        ),
        Alert(
            "SidecarMixedPhases",
            "phase",
            f"count by ({APP}) (count by ({APP}, phase) (sidecar_phase == 1)) > 1",
            s.hold(10 * MINUTE),
            "warning",
            f"{AT_APP}: the pods have been in different phases for long; a step waits for one of them",
        ),
        Alert(
            "SidecarUnsafePhases",
            "phase",
            " or ".join(f"({a} and {b})" for a, b in apart),
            s.hold(0),
            "critical",
            f"{AT_APP}: two pods are in phases that must not coexist; reads may miss records",
        ),
        Alert(
            "SidecarForcedTransition",
            "phase",
            counted('sidecar_phase_transitions_total{forced="true"}', f"{APP}, from, to", s.window(HOUR)),
            s.hold(0),
            "info",
            f"{AT_APP}: a step was made with phase_force: {{{{ $labels.from }}}} to {{{{ $labels.to }}}}",
        ),
        Alert(
            "SidecarReloadFailed",
            "phase",
            f"max by ({POD}) (sidecar_config_last_reload_successful) == 0",
            s.hold(MINUTE),
            "warning",
            f"{AT_POD}: the configuration was refused; the last good one is in force",
        ),
        Alert(
            "SidecarConfigDiffers",
            "phase",
            f"count by ({APP}) (count by ({APP}, hash) (sidecar_config_info == 1)) > 1",
            s.hold(15 * MINUTE),
            "warning",
            f"{AT_APP}: the pods have run with different configurations for long",
        ),
        Alert(
            "SidecarFleetSilent",
            "phase",
            f'max by ({APP}, phase) (sidecar_fleet_instances{{state="silent"}}) > 0',
            s.hold(10 * MINUTE),
            "warning",
            f"{AT_APP}: {{{{ $value }}}} instances send no heartbeat and still count; no step is made",
        ),
        Alert(
            "SidecarNameShared",
            "phase",
            f"max by ({APP}) (sidecar_fleet_shared_names) > 0",
            s.hold(2 * MINUTE),
            "warning",
            f"{AT_APP}: {{{{ $value }}}} names are borne by more than one pod; give each its own `instance`",
        ),
        Alert(
            "SidecarFenced",
            "phase",
            f"max by ({POD}) (sidecar_fleet_fenced) == 1",
            s.hold(MINUTE),
            "critical",
            f"{AT_POD}: out of touch with the fleet; reads answer 503, what is accepted waits to be decided",
        ),
        Alert(
            "SidecarUndecidedRecords",
            "phase",
            f"max by ({POD}) (sidecar_spool_undecided_records) > 0",
            s.hold(5 * MINUTE),
            "warning",
            f"{AT_POD}: {{{{ $value }}}} accepted records are owed to no store yet; they wait for the fleet's phase",
        ),
    )


def _consistency(s: Scale) -> tuple[Alert, ...]:
    last = {kind: f"max by ({APP}) (sidecar_validation_last_{kind}_timestamp_seconds)" for kind in ("success", "clean")}
    written = 'sidecar_phase{phase=~"dual_write|dual_write_read_dynamo"}'
    both_written = f"max by ({APP}) ({written}) == 1"
    both_written_before = f"max by ({APP}) ({written} offset {s.window(DAY)}) == 1"
    return (
        Alert(
            "SidecarDivergenceAge",
            "consistency",
            f"max by ({APP}) (sidecar_divergence_oldest_age_seconds) > {s.seconds(15 * MINUTE)}",
            s.hold(5 * MINUTE),
            "warning",
            f"{AT_APP}: a record has been in one store only for {{{{ $value | humanizeDuration }}}}",
        ),
        Alert(
            "SidecarDivergenceCount",
            "consistency",
            f"sum by ({APP}, present_in, missing_from) (sidecar_divergence_records) > 10000",
            s.hold(10 * MINUTE),
            "warning",
            f"{AT_APP}: {{{{ $value }}}} records are missing from {{{{ $labels.missing_from }}}}",
        ),
        Alert(
            "SidecarValidationStale",
            "consistency",
            # or both are written since a day, and there was never one: then the time of the last does not exist
            f"(time() - {last['success']} > {s.seconds(DAY)}) and on ({APP}) ({both_written})"
            f" or ((({both_written}) * {s.seconds(DAY)} and on ({APP}) ({both_written_before}))"
            f" unless on ({APP}) {last['success']})",
            s.hold(15 * MINUTE),
            "warning",
            f"{AT_APP}: no validation has completed for {{{{ $value | humanizeDuration }}}}",
        ),
        Alert(
            "SidecarValidationNotClean",
            "consistency",
            f"{last['success']} > {last['clean']} or ({last['success']} unless {last['clean']})",
            s.hold(15 * MINUTE),
            "warning",
            f"{AT_APP}: the last validation was not clean: something differs, or could not be decided",
        ),
        Alert(
            "SidecarGapReleased",
            "consistency",
            f'max by ({APP}, store) (sidecar_open_gap_records{{kind="released"}}) > 0',
            s.hold(5 * MINUTE),
            "warning",
            f"{AT_APP}: {{{{ $value }}}} records for {{{{ $labels.store }}}} were released; backfill them",
        ),
        Alert(
            "SidecarGapOpen",
            "consistency",
            f'max by ({APP}, store, kind) (sidecar_open_gap_records{{kind!="released"}}) > 0',
            s.hold(7 * DAY),
            "info",
            f"{AT_APP}: {{{{ $labels.store }}}} lacks {{{{ $value }}}} records ({{{{ $labels.kind }}}})",
        ),
        Alert(
            "SidecarShadowMismatch",
            "consistency",
            counted(
                'sidecar_shadow_reads_total{result=~"missing|extra|field|order"}',
                f"{APP}, pattern, result",
                s.window(15 * MINUTE),
            ),
            s.hold(0),
            "warning",
            f"{AT_APP}: shadow reads of {{{{ $labels.pattern }}}} differ ({{{{ $labels.result }}}})",
        ),
    )
