"""Every metric of the sidecar: name, help, labels, once (semantics, section 7).

Two kinds: *events* are counted where they happen, per batch; *observations* are read from their owner at each scrape,
so that the identity of section 6 holds within every scrape. Labels are bounded: stores, phases, classes, reasons from
fixed tables; never a value that comes from a record.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Row = tuple[tuple[str, ...], float]
Source = Callable[[], Iterable[Row]]


@dataclass(frozen=True, slots=True)
class Observation:
    """One metric that is read at scrape time."""

    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


_STORE = ("store",)

OBSERVATIONS: Mapping[str, Observation] = {
    "store_records_owed_total": Observation("counter", "Records accepted that this store is owed.", _STORE),
    "store_records_delivered_total": Observation("counter", "Records confirmed by the store.", _STORE),
    "store_records_released_total": Observation(
        "counter", "Best-effort records given up to make room; each is in the gap ledger.", _STORE
    ),
    "store_records_discarded_total": Observation("counter", "Dead letters discarded by an operator.", _STORE),
    "store_records_quarantined_total": Observation(
        "counter", "Owed records whose bytes on disk were found damaged.", _STORE
    ),
    "store_pending_records": Observation("gauge", "Records owed and not yet settled.", _STORE),
    "store_pending_bytes": Observation("gauge", "Stored size of the pending records.", _STORE),
    "store_oldest_pending_age_seconds": Observation("gauge", "Age of the oldest pending record; 0 if none.", _STORE),
    "store_state": Observation("gauge", "1 for the state that delivery is in.", ("store", "state")),
    "store_inflight_limit": Observation("gauge", "Write calls that may be under way.", _STORE),
    "store_rate_limit_records": Observation(
        "gauge", "Records per second that may be sent; +Inf where nothing limits.", _STORE
    ),
    "dead_letter_records": Observation("gauge", "Dead letters kept, by retry class.", ("store", "reason")),
    "divergence_records": Observation(
        "gauge",
        "Records of this sidecar confirmed in one owed store and not in the other.",
        ("present_in", "missing_from"),
    ),
    "divergence_oldest_age_seconds": Observation("gauge", "Age of the oldest diverging record; 0 if none."),
    "open_gap_records": Observation(
        "gauge", "Records that a store was not given, as the gap ledgers were read last.", ("store", "kind")
    ),
    "divergence_at_rest_records": Observation(
        "gauge", "Differences that the last validation found, by reason.", ("class",)
    ),
    "validation_last_success_timestamp_seconds": Observation("gauge", "When a validation was last finished."),
    "validation_last_clean_timestamp_seconds": Observation("gauge", "When a validation last found no difference."),
    "validation_running": Observation("gauge", "1 while this instance compares the stores."),
    "phase": Observation("gauge", "1 for the phase that is applied.", ("phase",)),
    "desired_phase": Observation("gauge", "1 for the phase that is asked for.", ("phase",)),
    "phase_epoch": Observation("gauge", "Epoch of the applied phase."),
    "phase_held": Observation("gauge", "1 for each gate that stops a phase change now.", ("gate",)),
    "fleet_fenced": Observation("gauge", "1 while this instance has lost touch with the fleet."),
    "fleet_instances": Observation("gauge", "Instances as the fleet's leader sees them.", ("phase", "state")),
    "fleet_shared_names": Observation(
        "gauge", "Names that more than one process bears, as the fleet's leader sees them."
    ),
    "config_last_reload_successful": Observation("gauge", "1 if the configuration file is the one in force."),
    "config_last_reload_success_timestamp_seconds": Observation("gauge", "When a configuration last came into force."),
    "config_info": Observation("gauge", "1; labelled with the content hash of the configuration.", ("hash",)),
    "spool_bytes": Observation("gauge", "Bytes that the spool occupies, its log included."),
    "spool_capacity_bytes": Observation("gauge", "The spool's cap."),
    "spool_free_disk_bytes": Observation("gauge", "Free bytes of the spool's file system."),
    "spool_quarantined_records_total": Observation(
        "counter", "Records found damaged on disk and kept aside; a lower bound."
    ),
    "spool_wal_damage_total": Observation("counter", "Damages found in the spool's log at start."),
    "spool_undecided_records": Observation(
        "gauge", "Records accepted while fenced: who is owed them is decided when the fleet's phase is known again."
    ),
    "backpressure_active": Observation("gauge", "1 while ingest answers 503, by reason.", ("reason",)),
    "undelivered_at_exit": Observation(
        "gauge", "Records that this start found undelivered; undecided: owed to stores yet to be decided.", _STORE
    ),
    "shadow_sample_share": Observation("gauge", "Share of reads that is repeated on the other store now."),
    "dedup_ids": Observation("gauge", "Ids in the dedup window."),
    # Of a backfill's own process, with --ops.
    "backfill_stage": Observation("gauge", "1 for what the backfill is doing.", ("stage",)),
    "backfill_records_total": Observation("counter", "Records of the run, by what became of them.", ("result",)),
    "backfill_left_records": Observation("gauge", "Records found missing and not copied yet."),
    "backfill_rate_limit_records": Observation("gauge", "Records per second that may be copied; +Inf: no bound."),
    "backfill_consumed_capacity_units_total": Observation(
        "counter", "Write capacity units that this process consumed.", ("target",)
    ),
}


class _Observer(Collector):
    """Reads the registered sources at each scrape."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        for name, source in self._sources.items():
            o = OBSERVATIONS[name]
            family: CounterMetricFamily | GaugeMetricFamily
            if o.kind == "counter":
                family = CounterMetricFamily(f"sidecar_{name}", o.help, labels=o.labels)
            else:
                family = GaugeMetricFamily(f"sidecar_{name}", o.help, labels=o.labels)
            for labels, value in source():
                family.add_metric(labels, value)
            yield family


_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """The events, and the place where owners register their observations."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._sources: dict[str, Source] = {}
        registry.register(_Observer(self._sources))

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"sidecar_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, labels: Sequence[str] = ()) -> Histogram:
            return Histogram(f"sidecar_{name}", text, labels, registry=registry, buckets=_FAST)

        self.records_accepted = counter("records_accepted_total", "Records made durable.", ("phase",))
        self.records_refused = counter("records_refused_total", "Records refused at the door.", ("reason",))
        self.records_duplicate = counter("records_duplicate_total", "Resends recognised in the dedup window.")
        self.requests = counter("http_requests_total", "Answers by route and status.", ("route", "status"))
        self.store_write_seconds = histogram("store_write_seconds", "Duration of one write call.", ("store",))
        self.store_retries = counter("store_retries_total", "Write calls or records to try again.", ("store", "class"))
        self.shipper_restarts = counter("shipper_restarts_total", "Delivery tasks that died.", ("store",))
        self.spool_commit_seconds = histogram("spool_commit_seconds", "Duration of a commit, fsync included.")
        self.config_reload_failures = counter("config_reload_failures_total", "Configurations refused.")
        self.phase_transitions = counter("phase_transitions_total", "Applied phase changes.", ("from", "to", "forced"))
        self.read_seconds = histogram("read_seconds", "Duration of one read at its store.", ("pattern", "store"))
        self.shadow_reads = counter(
            "shadow_reads_total", "Reads repeated on the other store, by what came of it.", ("pattern", "result")
        )
        self.shadow_skipped = counter("shadow_skipped_total", "Sampled reads not repeated, by reason.", ("reason",))
        self.consumed_capacity = counter(
            "dynamodb_consumed_capacity_units_total", "Consumed write capacity units.", ("target",)
        )

    def observe(self, name: str, source: Source) -> None:
        """Register the owner of an observation. Raises KeyError for a name that is not in the table."""
        if name not in OBSERVATIONS:
            raise KeyError(name)
        self._sources[name] = source
