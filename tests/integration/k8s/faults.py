"""A written fault for every alert: series by the minute, when the alert must be silent, firing, and silent again."""

from dataclasses import dataclass
from typing import Any

DAY = 24 * 60
POD = 'namespace="n",app="a",pod="p"'


def steady(value: float, minutes: int) -> str:
    """The same value for that many minutes."""
    return f"{value}x{minutes - 1}"


def rising(start: float, by: float, minutes: int) -> str:
    """One step a minute."""
    return f"{start}+{by}x{minutes - 1}"


def none(minutes: int) -> str:
    """No sample for that many minutes."""
    return f"_x{minutes}"


@dataclass(frozen=True)
class Case:
    """One fault.

    ``series`` maps a metric with its labels (those of the pod are added) to its values; the rest are minutes: while
    the fault is too young to tell, when the alert must fire, when it must be silent again.
    """

    alert: str
    series: dict[str, tuple[str, ...]]
    quiet: int
    fires: int
    clears: int
    every: str = "1m"  # how often the rules are evaluated

    def promtool(self) -> dict[str, Any]:
        """The file that ``promtool test rules`` reads."""
        query = f'sum(ALERTS{{alertname="{self.alert}",alertstate="firing"}})'
        return {
            "rule_files": ["rules.yaml"],
            "evaluation_interval": self.every,
            "tests": [
                {
                    "interval": "1m",
                    "input_series": [
                        {"series": _with_pod(name), "values": " ".join(values)} for name, values in self.series.items()
                    ],
                    "promql_expr_test": [
                        {
                            "expr": query,
                            "eval_time": f"{minute}m",
                            "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
                        }
                        for minute, fires in ((self.quiet, False), (self.fires, True), (self.clears, False))
                    ],
                }
            ],
        }


def _with_pod(name: str) -> str:
    if "pod=" in name:
        return name
    metric, _, labels = name.rstrip("}").partition("{")
    return f"{metric}{{{POD}{',' + labels if labels else ''}}}"


def gauge(alert: str, series: str, *, bad: float, good: float = 0, hold: int) -> Case:
    """A gauge that is bad from minute 10 on until the alert's patience is over, and then good again."""
    values = (steady(good, 10), steady(bad, hold + 5), steady(good, 10))
    return Case(alert, {series: values}, quiet=10 + hold - 1 if hold else 9, fires=10 + hold + 1, clears=10 + hold + 8)


def event(alert: str, series: str, *, window: int) -> Case:
    """A counter that shows up with its first event at minute 10, and is told for the length of the window."""
    return Case(alert, {series: (none(10), steady(1, 2 * window))}, quiet=9, fires=11, clears=10 + window + 6)


PHASE = "sidecar_phase"
CASES = (
    Case(
        "SidecarDown",
        {'up{job="hybrid-log-sidecar"}': (steady(1, 10), steady(0, 10), steady(1, 10))},
        quiet=11,
        fires=13,
        clears=21,
    ),
    gauge("SidecarBackPressure", 'sidecar_backpressure_active{reason="spool_full"}', bad=1, hold=1),
    Case(
        "SidecarSpoolNearCap",
        {
            "sidecar_spool_bytes": (steady(100, 10), steady(710, 10), steady(100, 10)),
            "sidecar_spool_capacity_bytes": (steady(1000, 30),),
        },
        quiet=14,
        fires=16,
        clears=21,
    ),
    Case(
        "SidecarSpoolFullSoon",
        {
            "sidecar_spool_bytes": (steady(100, 30), rising(100, 3, 60), steady(280, 60)),
            "sidecar_spool_capacity_bytes": (steady(1000, 150),),
        },
        quiet=55,
        fires=85,
        clears=130,
    ),
    Case(
        "SidecarSpoolDamaged",
        {
            "sidecar_spool_quarantined_records_total": (steady(0, 180),),
            # an old damage is told once; then the pod comes back under another address with one more on disk
            'sidecar_spool_wal_damage_total{instance="1"}': (steady(2, 80),),
            'sidecar_spool_wal_damage_total{instance="2"}': (none(80), steady(3, 100)),
        },
        quiet=79,
        fires=90,
        clears=145,
    ),
    Case(
        "SidecarSlowCommits",
        {
            'sidecar_spool_commit_seconds_bucket{le="0.1"}': (steady(0, 30), rising(60, 60, 30)),
            'sidecar_spool_commit_seconds_bucket{le="1"}': (rising(0, 60, 60),),
            'sidecar_spool_commit_seconds_bucket{le="+Inf"}': (rising(0, 60, 60),),
        },
        quiet=14,
        fires=20,
        clears=45,
    ),
    event("SidecarRecordsRefused", 'sidecar_records_refused_total{reason="nul"}', window=15),
    gauge("SidecarStoreBlocked", 'sidecar_store_state{store="dynamodb",state="blocked"}', bad=1, hold=1),
    gauge("SidecarPendingAge", 'sidecar_store_oldest_pending_age_seconds{store="postgres"}', bad=301, good=2, hold=2),
    Case(
        "SidecarThrottled",
        {
            'sidecar_store_retries_total{store="dynamodb",class="throttle"}': (
                steady(0, 10),
                rising(60, 60, 60),  # once a second: as often as one pod asks a store that throttles everything
                steady(3660, 30),
            )
        },
        quiet=35,
        fires=65,
        clears=90,
    ),
    gauge("SidecarDeadLetters", 'sidecar_dead_letter_records{store="postgres",reason="permanent"}', bad=1, hold=0),
    event("SidecarShipperRestarted", 'sidecar_shipper_restarts_total{store="postgres"}', window=15),
    Case(
        "SidecarIdentityBroken",
        {
            'sidecar_store_records_owed_total{store="postgres"}': (steady(10, 40),),
            'sidecar_store_records_delivered_total{store="postgres"}': (steady(8, 40),),
            'sidecar_store_pending_records{store="postgres"}': (steady(2, 10), steady(1, 30)),
            'sidecar_store_records_released_total{store="postgres"}': (steady(0, 40),),
            'sidecar_store_records_discarded_total{store="postgres"}': (steady(0, 40),),
            'sidecar_store_records_quarantined_total{store="postgres"}': (steady(0, 40),),
            'sidecar_dead_letter_records{store="postgres",reason="permanent"}': (none(20), steady(1, 20)),
            'sidecar_dead_letter_records{store="postgres",reason="refused"}': (steady(7, 40),),
        },
        quiet=10,
        fires=12,
        clears=22,
    ),
    Case(
        "SidecarPhaseHeld",
        {
            'sidecar_desired_phase{phase="dual_write"}': (none(10), steady(1, 40)),
            'sidecar_desired_phase{phase="sql_only"}': (steady(1, 10), none(1)),
            'sidecar_phase{phase="sql_only"}': (steady(1, 35), steady(0, 15)),
            'sidecar_phase{phase="dual_write"}': (steady(0, 35), steady(1, 15)),
        },
        quiet=24,
        fires=26,
        clears=36,
    ),
    Case(
        "SidecarMixedPhases",
        {
            f'{PHASE}{{namespace="n",app="a",pod="p",phase="sql_only"}}': (steady(1, 30), steady(0, 10)),
            f'{PHASE}{{namespace="n",app="a",pod="p",phase="dual_write"}}': (steady(0, 30), steady(1, 10)),
            f'{PHASE}{{namespace="n",app="a",pod="q",phase="sql_only"}}': (steady(1, 10), steady(0, 30)),
            f'{PHASE}{{namespace="n",app="a",pod="q",phase="dual_write"}}': (steady(0, 10), steady(1, 30)),
        },
        quiet=19,
        fires=21,
        clears=31,
    ),
    Case(
        "SidecarUnsafePhases",
        {
            f'{PHASE}{{namespace="n",app="a",pod="p",phase="dual_write"}}': (steady(1, 40),),
            f'{PHASE}{{namespace="n",app="a",pod="q",phase="dual_write"}}': (steady(1, 10), steady(0, 30)),
            f'{PHASE}{{namespace="n",app="a",pod="q",phase="dual_write_read_dynamo"}}': (
                steady(0, 10), steady(1, 10), steady(0, 10), steady(1, 10),
            ),
            f'{PHASE}{{namespace="n",app="a",pod="q",phase="dynamo_only"}}': (
                steady(0, 20), steady(1, 10), steady(0, 10),
            ),
        },
        quiet=15,  # neighbours: a step under way
        fires=21,
        clears=31,
    ),
    event(
        "SidecarForcedTransition",
        'sidecar_phase_transitions_total{from="sql_only",to="dual_write",forced="true"}',
        window=60,
    ),
    gauge("SidecarReloadFailed", "sidecar_config_last_reload_successful", bad=0, good=1, hold=1),
    Case(
        "SidecarConfigDiffers",
        {
            'sidecar_config_info{namespace="n",app="a",pod="p",hash="1"}': (steady(1, 50),),
            'sidecar_config_info{namespace="n",app="a",pod="q",hash="1"}': (steady(1, 10), none(25), steady(1, 15)),
            'sidecar_config_info{namespace="n",app="a",pod="q",hash="2"}': (none(10), steady(1, 25)),
        },
        quiet=24,
        fires=26,
        clears=42,
    ),
    gauge("SidecarFleetSilent", 'sidecar_fleet_instances{phase="dual_write",state="silent"}', bad=1, hold=10),
    gauge("SidecarNameShared", "sidecar_fleet_shared_names", bad=1, hold=2),
    gauge("SidecarFenced", "sidecar_fleet_fenced", bad=1, hold=1),
    gauge("SidecarUndecidedRecords", "sidecar_spool_undecided_records", bad=7, hold=5),
    gauge("SidecarDivergenceAge", "sidecar_divergence_oldest_age_seconds", bad=901, good=3, hold=5),
    gauge(
        "SidecarDivergenceCount",
        'sidecar_divergence_records{present_in="postgres",missing_from="dynamodb"}',
        bad=10_001,
        good=40,
        hold=10,
    ),
    Case(
        "SidecarValidationStale",
        {
            "sidecar_validation_last_success_timestamp_seconds": (steady(60, DAY + 40), steady(88_000, 20)),
            'sidecar_phase{phase="dual_write"}': (steady(1, DAY + 60),),
        },
        quiet=DAY + 10,
        fires=DAY + 20,
        clears=DAY + 42,
    ),
    Case(  # never one at all: silent for the first day of writing to both
        "SidecarValidationStale",
        {
            "sidecar_validation_last_success_timestamp_seconds": (none(10 + DAY + 40), steady(87_000, 40)),
            'sidecar_phase{phase="dual_write"}': (steady(0, 10), steady(1, DAY + 80)),
        },
        quiet=DAY + 10,
        fires=DAY + 30,
        clears=DAY + 55,
    ),
    Case(
        "SidecarValidationNotClean",
        {
            "sidecar_validation_last_success_timestamp_seconds": (steady(60, 10), steady(600, 40)),
            "sidecar_validation_last_clean_timestamp_seconds": (steady(60, 30), steady(600, 20)),
        },
        quiet=24,
        fires=26,
        clears=31,
    ),
    Case(  # the very first one was not clean: there is no time of a clean one
        "SidecarValidationNotClean",
        {
            "sidecar_validation_last_success_timestamp_seconds": (none(10), steady(600, 40)),
            "sidecar_validation_last_clean_timestamp_seconds": (none(30), steady(1800, 20)),
        },
        quiet=24,
        fires=26,
        clears=31,
    ),
    gauge("SidecarGapReleased", 'sidecar_open_gap_records{store="dynamodb",kind="released"}', bad=4, hold=5),
    Case(
        "SidecarGapOpen",
        {
            'sidecar_open_gap_records{store="dynamodb",kind="history"}': (
                steady(4, 7 * DAY + 120),
                steady(0, 120),
            )
        },
        quiet=7 * DAY - 30,
        fires=7 * DAY + 60,
        clears=7 * DAY + 180,
        every="30m",
    ),
    event(
        "SidecarShadowMismatch", 'sidecar_shadow_reads_total{pattern="by_id",result="field"}', window=15
    ),
)  # fmt: skip
