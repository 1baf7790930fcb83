"""One of three sidecars is stopped for longer than the fence, and wakes two phases behind with requests waiting.

Two walks, because harm has two forms: who still *reads* by phase 1 misses what phase 3 writes, and who still *stamps*
by phase 0 writes what phase 2 does not find. Each walk has its control without the fence, which is found guilty.
"""

import pytest

from tests.scenarios.crew import crew

WALKS = {
    "reads": ("dual_write", ["dynamo_only"], [(1, 2), (2, 3)]),
    "stamps": ("sql_only", ["dual_write", "dual_write_read_dynamo"], [(0, 1), (1, 2)]),
}


async def stop_one_and_walk_on(fleet, way, steps):
    """SIGSTOP c; the others count it out and go their way, every gap filled; requests wait at c; SIGCONT."""
    others = [name for name in fleet.pods if name != "c"]
    async with fleet.load():
        await fleet.reads("postgres")
        fleet.stop("c")
        for phase in way:
            await fleet.fill("dynamodb")
            fleet.swap(phase, phase_force="the scenario")
            await fleet.reaches(phase, *others)
        await fleet.writes(*others, n=60)
        await fleet.reads("dynamodb", *others)
        async with fleet.waiting("c"):
            fleet.go_on("c")
        await fleet.reaches(way[-1], "c")
        await fleet.writes("c")
        await fleet.reads("dynamodb", n=30)
    assert await fleet.walk() == steps


@pytest.mark.parametrize("harm", WALKS)
async def test_an_instance_that_was_stopped_for_longer_than_the_fence_does_no_harm_when_it_wakes(stand, http, harm):
    """It refuses to read, stamps nothing old, joins, and nothing that it acknowledged is missing anywhere."""
    start, way, steps = WALKS[harm]
    async with crew(stand, http, "abc", phase=start) as fleet:
        await stop_one_and_walk_on(fleet, way, steps)
        await fleet.judge(again=300)
        assert fleet.refused["c", 503, "phase_unknown"] > 0


@pytest.mark.parametrize("harm", WALKS)
async def test_without_the_fence_it_would_do_that_harm(stand, http, harm):
    """The control: the same with an instance that never fences itself."""
    start, way, steps = WALKS[harm]
    async with crew(stand, http, "ac", phase=start, unfenced="c") as fleet:
        await stop_one_and_walk_on(fleet, way, steps)
        with pytest.raises(AssertionError, match="unsafe reads"):
            await fleet.judge(again=300)
