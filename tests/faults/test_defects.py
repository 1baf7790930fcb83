"""A defect of the sidecar's own, in one of its parts: it shows, and it costs neither records nor the other parts."""

from tests.faults.process import ended, start
from tests.parts.sidecar import eventually
from tests.scenarios.test_write_path import post


async def test_a_defect_in_reading_the_configuration_ends_neither_the_sidecar_nor_the_reading(stand, http):
    """It is counted and told, records are accepted, and the change is applied at a later look."""
    sidecar = await start(stand.sidecar(phase="sql_only"), without="defective_reload")
    sidecar.configure(phase="dual_write")

    async def applied():
        return (await sidecar.json("/status"))["phase"]["applied"] == "dual_write"

    await eventually(applied, seconds=60, what="the new phase")
    assert (await sidecar.metrics())["sidecar_config_reload_failures_total"] >= 1
    await post(http, sidecar, [{"service_name": "s"}])
    await sidecar.drained()
    assert next(e["task"] for e in sidecar.events() if e["event"] == "task died and is started again") == "reload"


async def test_a_defect_that_ends_a_part_stops_the_sidecar_in_order_and_is_no_success(stand):
    """Exit code 70, after a drain: whoever looks at the pod sees that it did not end well."""
    sidecar = stand.sidecar(phase="sql_only")
    await start(sidecar, without="defective_warming")
    assert await ended(sidecar, 60) == 70
    assert [e["event"] for e in sidecar.events() if e["event"] in ("task ended", "stopped")] == [
        "task ended",
        "stopped",
    ]
