"""The script of the watched run: five applications, what befalls them, and which alerts must tell of it."""

import asyncio
import subprocess
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from sidecar.clock import SystemClock
from sidecar.gaps import GapLine
from sidecar.stores.postgres import PostgresStore
from tests.integration.k8s.kubelet import Pod, flip_a_bit, live_frames
from tests.integration.k8s.tools import tool
from tests.integration.k8s.watching import PATIENCE, Application, Plan, dated
from tests.parts.fault_proxy import Refuse, Reset
from tests.parts.sidecar import eventually

STRACE = ("-f", "-qq", "-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:delay_exit=400000")
FENCE_AFTER = 15  # seconds

# --- phases: three pods that follow their own files, so that each can be brought into any phase -----------------------


@asynccontextmanager
async def _a_record_is_changed_behind_the_sidecars(a: Application) -> AsyncIterator[None]:
    changed = str(uuid.uuid4())
    assert await a.post(a.pods[0], {**dated(changed, hours=2), "service_name": "s"}) == 202
    await a.pods[0].drained(PATIENCE)
    await a.sql(f"UPDATE \"{a.pg.table}\" SET user_id = 'somebody' WHERE log_id = '{changed}'")

    async def look() -> None:
        while True:
            assert await a.read(a.pods[0], changed) == 200
            await asyncio.sleep(0.5)

    looking = asyncio.create_task(look())
    await a.validated("divergent")
    yield
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    await a.sql(f"UPDATE \"{a.pg.table}\" SET user_id = NULL WHERE log_id = '{changed}'")
    await a.validated("clean")


@asynccontextmanager
async def _the_application_sends_nonsense(a: Application) -> AsyncIterator[None]:
    assert await a.post(a.pods[0], {"service_name": ""}) == 422
    yield


@asynccontextmanager
async def _the_configuration_is_garbage(a: Application) -> AsyncIterator[None]:
    a.pods[0].apply("phase: [")
    yield
    a.pods[0].apply(a.config())


@asynccontextmanager
async def _one_pod_has_not_seen_the_change(a: Application) -> AsyncIterator[None]:
    for pod in a.pods[1:]:
        pod.apply(a.config("dual_write_read_dynamo"))
    yield
    for pod in a.pods:
        pod.apply(a.config())


@asynccontextmanager
async def _two_steps_at_once_are_asked_for(a: Application) -> AsyncIterator[None]:
    for pod in a.pods:
        pod.apply(a.config("dynamo_only"))
    yield
    for pod in a.pods:
        pod.apply(a.config())


@asynccontextmanager
async def _one_pod_is_forced_two_steps_ahead(a: Application) -> AsyncIterator[None]:
    a.pods[2].apply(a.config("dynamo_only", "phase_force: a scripted fault"))
    yield
    a.pods[2].apply(a.config("dual_write", "phase_force: back from a scripted fault"))
    await a.in_phase(a.pods[2], "dual_write")
    a.pods[2].apply(a.config())
    await a.command(a.pods[2], "backfill", "--from", "dynamodb", "--to", "postgres", "--rate", "none")  # closes the gap


@asynccontextmanager
async def _a_container_is_killed(a: Application) -> AsyncIterator[None]:
    a.pods[0].kill()
    yield
    await a.pods[0].start()


# --- fleet: two pods that change phase together -----------------------------------------------------------------------


@asynccontextmanager
async def _an_instance_dies_while_a_store_is_down(a: Application) -> AsyncIterator[None]:
    """Nobody can be counted out while a store does not answer: it might be at work there."""
    a.ddb_proxy.on("*", Reset())
    a.pods[0].kill()
    yield
    a.ddb_proxy.clear()
    await a.pods[0].start()


@asynccontextmanager
async def _two_pods_have_one_name(a: Application) -> AsyncIterator[None]:
    first, second = a.pods
    own = second.environ["HOSTNAME"]
    second.environ["HOSTNAME"] = first.environ["HOSTNAME"]
    await a.restart(second)
    yield
    second.environ["HOSTNAME"] = own
    await a.restart(second)


@asynccontextmanager
async def _both_stores_are_out_of_reach(a: Application) -> AsyncIterator[None]:
    await a.pg_proxy.refuse()
    a.ddb_proxy.on("*", Reset())
    yield
    a.ddb_proxy.clear()
    await a.pg_proxy.normal()


# --- stores: one pod between a bad disk and two stores that fail ------------------------------------------------------


@asynccontextmanager
async def _dynamodb_is_down(a: Application) -> AsyncIterator[None]:
    a.ddb_proxy.on("*", Reset())
    for _ in range(12):
        assert await a.post(a.pods[0], [{"service_name": "s"}] * 1000) == 202
    yield
    a.ddb_proxy.clear()


@asynccontextmanager
async def _dynamodb_throttles(a: Application) -> AsyncIterator[None]:
    a.ddb_proxy.on("BatchWriteItem", Refuse(400, "ProvisionedThroughputExceededException"))
    yield
    a.ddb_proxy.clear()


@asynccontextmanager
async def _the_table_is_gone(a: Application) -> AsyncIterator[None]:
    await a.sql(f'ALTER TABLE "{a.pg.table}" RENAME TO away')
    yield
    await a.sql(f'ALTER TABLE away RENAME TO "{a.pg.table}"')


@asynccontextmanager
async def _a_record_breaks_a_constraint(a: Application) -> AsyncIterator[None]:
    await a.sql(f'ALTER TABLE "{a.pg.table}" ADD CONSTRAINT no_599 CHECK (status_code <> 599)')
    assert await a.post(a.pods[0], [{"service_name": "s", "status_code": 599}, *[{"service_name": "s"}] * 20]) == 202
    yield
    await a.sql(f'ALTER TABLE "{a.pg.table}" DROP CONSTRAINT no_599')
    redrive = {"select": {"all": True}, "reason": "the constraint is gone"}
    assert (await a.order(a.pods[0], "/api/control/dead-letters/redrive", redrive))["records"] == 1


@asynccontextmanager
async def _the_disk_flips_a_bit(a: Application) -> AsyncIterator[None]:
    (pod,) = a.pods
    a.ddb_proxy.on("*", Reset())
    for _ in range(5):  # the log may just have begun anew; then it holds too little that counts
        for _ in range(20):
            await a.post(pod, [{"service_name": "s", "request_data": "y" * 500}] * 20)
        pod.kill()
        (log,) = pod.spool.glob("*-wal")
        frames = live_frames(log)
        if len(frames) > 8:
            break
        await pod.start()
    flip_a_bit(log, frames[len(frames) // 2] + 100)
    await pod.start()
    yield
    a.ddb_proxy.clear()
    await a.validated("clean")  # a process that starts without DynamoDB does not know when that was last


@asynccontextmanager
async def _the_disk_is_slow(a: Application) -> AsyncIterator[None]:
    assert a.pods[0].process
    strace = subprocess.Popen(
        [tool("strace"), *STRACE, "-p", str(a.pods[0].process.pid)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield
    strace.terminate()
    await asyncio.to_thread(strace.wait, 60)


# --- spool: one pod whose spool fills ---------------------------------------------------------------------------------


@asynccontextmanager
async def _both_stores_are_down_until_the_spool_is_full(a: Application) -> AsyncIterator[None]:
    (pod,) = a.pods
    await a.pg_proxy.refuse()
    a.ddb_proxy.on("*", Reset())
    filling = asyncio.create_task(_fill(a, pod))
    yield
    filling.cancel()
    await asyncio.gather(filling, return_exceptions=True)
    # DynamoDB first: where PostgreSQL alone is back, it confirms, and what DynamoDB still lacks may be released
    a.ddb_proxy.clear()
    await eventually(lambda: _nearly_delivered(pod, "dynamodb"), seconds=PATIENCE, every=0.2, what="dynamodb")
    await a.pg_proxy.normal()


async def _fill(a: Application, pod: Pod, pause: float = 0.4) -> None:
    while await a.post(pod, [{"service_name": "big", "request_data": "z" * 170_000}] * 3) == 202:
        await asyncio.sleep(pause)


async def _nearly_delivered(pod: Pod, store: str) -> bool:
    """All but what the light load has just written."""
    return bool((await pod.json("/status"))["stores"][store]["account"]["pending"] < 50)


@asynccontextmanager
async def _dynamodb_is_down_until_its_backlog_is_released(a: Application) -> AsyncIterator[None]:
    """PostgreSQL takes everything, so nobody is pushed back; what makes room is written to the ledger first."""
    (pod,) = a.pods
    a.ddb_proxy.on("*", Reset())
    filling = asyncio.create_task(_fill(a, pod, pause=0.1))
    yield
    filling.cancel()
    await asyncio.gather(filling, return_exceptions=True)
    a.ddb_proxy.clear()
    await eventually(lambda: _nearly_delivered(pod, "dynamodb"), seconds=PATIENCE, every=0.2, what="dynamodb")
    await a.command(pod, "backfill", "--from", "postgres", "--to", "dynamodb", "--hours", "gaps", "--rate", "none")
    await a.restart(pod)  # it sees the closed ledger at once


# --- bug: one pod whose process is wrong, and whose stores nobody compares -----------------------------------------


@asynccontextmanager
async def _the_delivery_meets_what_nobody_foresaw(a: Application) -> AsyncIterator[None]:
    (a.base / "raise").touch()
    yield


@asynccontextmanager
async def _the_books_are_wrong(a: Application) -> AsyncIterator[None]:
    (a.base / "miscount").touch()
    yield
    (a.base / "miscount").unlink()


@asynccontextmanager
async def _history_is_missing(a: Application) -> AsyncIterator[None]:
    """As before a backfill; the ledger says so to a sidecar that starts, and to the others within five minutes."""
    await _gap(a, opened=4)
    await a.restart(a.pods[0])
    yield
    await _gap(a, opened=4, closed=4)
    await a.restart(a.pods[0])


async def _gap(a: Application, **counts: int) -> None:
    store = PostgresStore(a.pg, clock=SystemClock())
    try:
        await store.gap_ledger.put_gaps(
            [GapLine(store="dynamodb", kind="history", hour=490_000, source="fleet", **counts)]
        )
    finally:
        await store.close()


@asynccontextmanager
async def _nobody_compares_the_stores(a: Application) -> AsyncIterator[None]:
    yield
    await a.validated("clean")


PLANS: Mapping[str, Plan] = {
    "phases": Plan(
        pods=3,
        tracks=(
            (
                (_a_record_is_changed_behind_the_sidecars, {"SidecarShadowMismatch", "SidecarValidationNotClean"}),
                (_the_configuration_is_garbage, {"SidecarReloadFailed"}),
                (_one_pod_has_not_seen_the_change, {"SidecarMixedPhases", "SidecarConfigDiffers"}),
                (_two_steps_at_once_are_asked_for, {"SidecarPhaseHeld"}),
                (_one_pod_is_forced_two_steps_ahead, {"SidecarUnsafePhases", "SidecarForcedTransition"}),
                (_a_container_is_killed, {"SidecarDown"}),
            ),
            ((_the_application_sends_nonsense, {"SidecarRecordsRefused"}),),
        ),
    ),
    "fleet": Plan(
        pods=2,
        more=f"fleet: {{enabled: true, heartbeat: 1s, fence_after: {FENCE_AFTER}s}}",
        tracks=(
            (
                (_an_instance_dies_while_a_store_is_down, {"SidecarFleetSilent"}),
                (_two_pods_have_one_name, {"SidecarNameShared"}),
                (_both_stores_are_out_of_reach, {"SidecarFenced", "SidecarUndecidedRecords"}),
            ),
        ),
    ),
    "stores": Plan(
        tracks=(
            (
                (_the_table_is_gone, {"SidecarStoreBlocked"}),
                (_a_record_breaks_a_constraint, {"SidecarDeadLetters"}),
                (_the_disk_flips_a_bit, {"SidecarSpoolDamaged"}),
                (_the_disk_is_slow, {"SidecarSlowCommits"}),
                (_dynamodb_throttles, {"SidecarThrottled"}),
                (_dynamodb_is_down, {"SidecarPendingAge", "SidecarDivergenceAge", "SidecarDivergenceCount"}),
            ),
        ),
    ),
    "spool": Plan(
        tracks=(
            (
                (
                    _both_stores_are_down_until_the_spool_is_full,
                    {"SidecarSpoolFullSoon", "SidecarSpoolNearCap", "SidecarBackPressure"},
                ),
                # before there is much to compare: the local DynamoDB is slow at reading a whole index
                (_dynamodb_is_down_until_its_backlog_is_released, {"SidecarGapReleased"}),
            ),
        ),
    ),
    "bug": Plan(
        module="tests.integration.k8s.planted",
        balanced=False,
        compared=False,
        tracks=(
            ((_nobody_compares_the_stores, {"SidecarValidationStale"}),),
            (
                (_the_delivery_meets_what_nobody_foresaw, {"SidecarShipperRestarted"}),
                (_the_books_are_wrong, {"SidecarIdentityBroken"}),
                (_history_is_missing, {"SidecarGapOpen"}),
            ),
        ),
    ),
}


def scripted() -> set[str]:
    """Every alert that some fault must raise."""
    return {alert for plan in PLANS.values() for track in plan.tracks for _, alerts in track for alert in alerts}
