"""Who is asked for which observation at a scrape, and what ``/status`` says: read from the owners, copied nowhere."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from sidecar.clock import Clock
from sidecar.errors import Busy
from sidecar.metrics import Metrics, Row
from sidecar.overflow import Overflow
from sidecar.phase import Phase
from sidecar.retry import State
from sidecar.shipper import Shipper, ShipperStatus
from sidecar.spool import Counters, Spool

_COUNTERS = (
    ("store_records_owed_total", "owed"),
    ("store_records_delivered_total", "delivered"),
    ("store_records_released_total", "released"),
    ("store_records_discarded_total", "discarded"),
    ("store_records_quarantined_total", "quarantined"),
    ("store_pending_records", "pending"),
    ("store_pending_bytes", "pending_bytes"),
)


def _age(now_us: int, since_us: int | None) -> float:
    return 0.0 if since_us is None else max(0.0, (now_us - since_us) / 1e6)


def observe_spool(metrics: Metrics, spool: Spool, stores: Sequence[str], clock: Clock) -> None:
    """The accounts of every store, divergence, and the state of the buffer."""

    def account(field: str) -> Callable[[], list[Row]]:
        return lambda: [((s,), float(getattr(spool.counters(s), field))) for s in stores]

    for name, field in _COUNTERS:
        metrics.observe(name, account(field))
    metrics.observe(
        "store_oldest_pending_age_seconds",
        lambda: [((s,), _age(clock.now_us(), spool.counters(s).oldest_pending_us)) for s in stores],
    )
    metrics.observe("dead_letter_records", lambda: [(key, float(n)) for key, n in spool.dead_letter_counts().items()])
    metrics.observe("divergence_records", lambda: [(pair, float(n)) for pair, n in spool.divergence().items()])
    metrics.observe("divergence_oldest_age_seconds", lambda: [((), _age(clock.now_us(), spool.divergence_oldest_us()))])
    state = spool.state
    metrics.observe("spool_bytes", lambda: [((), float(state().bytes_used))])
    metrics.observe("spool_capacity_bytes", lambda: [((), float(state().capacity_bytes))])
    metrics.observe("spool_free_disk_bytes", lambda: [((), float(state().free_disk_bytes))])
    metrics.observe("spool_quarantined_records_total", lambda: [((), float(state().quarantined_records))])
    metrics.observe("spool_wal_damage_total", lambda: [((), float(state().wal_damage))])
    metrics.observe("spool_undecided_records", lambda: [((), float(spool.ledger.unresolved_records))])
    metrics.observe("dedup_ids", lambda: [((), float(state().dedup_ids))])


def observe_delivery(
    metrics: Metrics, shippers: Mapping[str, Shipper], standings: Callable[[], Mapping[str, ShipperStatus]]
) -> None:
    """What each shipper is doing; ``standings`` by store, see ``delivery.standing``."""
    metrics.observe(
        "store_state",
        lambda: [
            ((name, state.value), float(status.state is state))
            for name, status in standings().items()
            for state in State
        ],
    )
    metrics.observe("store_inflight_limit", lambda: [((n,), float(s.pace.limit)) for n, s in shippers.items()])
    metrics.observe("store_rate_limit_records", lambda: [((n,), s.pace.rate.current) for n, s in shippers.items()])


def observe_pushback(metrics: Metrics, spool: Spool, closed: Callable[[], Busy | None]) -> None:
    """Why ingest answers 503 now; ``closed`` is the fail-closed mode."""

    def reasons() -> list[Row]:
        shut = closed()
        active = {spool.state().busy_reason, shut.reason if shut is not None else ""}
        return [((reason,), float(reason in active)) for reason in ("spool_full", "disk_full", "fail_closed")]

    metrics.observe("backpressure_active", reasons)


def observe_gaps(metrics: Metrics, overflow: Overflow) -> None:
    """Open gaps of the fleet, as the ledgers were read last."""
    metrics.observe("open_gap_records", lambda: [(key, float(n)) for key, n in overflow.open_gaps().items()])


def observe_phase(
    metrics: Metrics,
    applied: Callable[[], Phase],
    desired: Callable[[], Phase],
    epoch: Callable[[], int],
    held: Callable[[], Sequence[str]],
) -> None:
    """The phase that is applied, the one that is wanted, and the gates that stand between."""
    metrics.observe("phase_held", lambda: [((gate,), 1.0) for gate in dict.fromkeys(held())])
    metrics.observe("phase", lambda: [((p.label,), float(applied() is p)) for p in Phase])
    metrics.observe("desired_phase", lambda: [((p.label,), float(desired() is p)) for p in Phase])
    metrics.observe("phase_epoch", lambda: [((), float(epoch()))])


def delivery_status(spool: Spool, standings: Mapping[str, ShipperStatus], clock: Clock) -> dict[str, object]:
    """The part of ``/status`` about the stores."""
    now_us = clock.now_us()
    stores: dict[str, object] = {}
    for name, standing in standings.items():
        status = asdict(standing)
        if math.isinf(status["rate_limit"]):
            status["rate_limit"] = None
        account: Counters = spool.counters(name)
        stores[name] = {
            **status,
            "account": asdict(account),
            "oldest_pending_age_seconds": _age(now_us, account.oldest_pending_us),
        }
    return stores


def spool_status(spool: Spool) -> dict[str, object]:
    """The part of ``/status`` about the buffer."""
    return {
        **asdict(spool.state()),
        "undecided_records": spool.ledger.unresolved_records,
        "dead_letters": {f"{store}/{kind}": n for (store, kind), n in spool.dead_letter_counts().items()},
        "divergence": [{"present_in": a, "missing_from": b, "records": n} for (a, b), n in spool.divergence().items()],
        "recovery": list(spool.recovery.messages),
    }


def gaps_status(overflow: Overflow) -> list[dict[str, object]]:
    """The part of ``/status`` about what stores were not given: open gaps, as the ledgers were read last."""
    return [{"store": store, "kind": kind, "records": n} for (store, kind), n in overflow.open_gaps().items() if n]
