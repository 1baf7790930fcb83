"""One of three sidecars is stopped for longer than the fence, and wakes two phases behind with requests waiting.

Two walks, because harm has two forms: who still *reads* by phase 1 misses what phase 3 writes, and who still *stamps*
by phase 0 writes what phase 2 does not find. The first has its control without the fence, which is found guilty. (The
second has a second line of defence: what is still pending when the instance joins is owed to the phase of then.)
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
async def test_an_instance_that_was_stopped_for_longer_than_the_fence_does_no_harm_when_it_wakes(
    quick_stand, http, harm
):
    """It refuses to read, stamps nothing old, joins, and nothing that it acknowledged is missing anywhere."""
    start, way, steps = WALKS[harm]
    async with crew(quick_stand, http, "abc", phase=start) as fleet:
        await stop_one_and_walk_on(fleet, way, steps)
        await fleet.judge(again=300)
        assert fleet.late
        assert fleet.refused["c", 503, "phase_unknown"] > 0


async def test_without_the_fence_it_would_read_where_nobody_writes_any_more(quick_stand, http):
    """The control: the same with an instance that never fences itself, and the judgement finds it guilty."""
    start, way, steps = WALKS["reads"]
    async with crew(quick_stand, http, "ac", phase=start, unfenced="c") as fleet:
        await stop_one_and_walk_on(fleet, way, steps)
        with pytest.raises(AssertionError, match="unsafe reads"):
            await fleet.judge(again=300)
