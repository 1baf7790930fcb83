"""Three sidecars change phase together while one hears late, one dies, one is stopped, and one store is down."""

import pytest

from tests.scenarios.crew import crew


async def test_the_fleet_waits_for_the_last_to_hear_and_for_nobody_who_is_dead(stand, http):
    """Swaps at different instants hold the step until the last; a killed instance holds it until it is counted out."""
    async with crew(stand, http, "abc", phase="sql_only") as fleet:
        async with fleet.load():
            await fleet.writes()
            fleet.swap("dual_write", "a", "b")
            await fleet.held("configurations_agree")
            assert {(await fleet.phase(name))["applied"] for name in "abc"} == {"sql_only"}
            await fleet.writes()
            fleet.swap("dual_write", "c")
            await fleet.reaches("dual_write")
            await fleet.settles("dual_write")
            fleet["b"].kill()
            fleet.swap("sql_only")
            await fleet.held("configurations_agree", "a", "c")
            await fleet.reaches("sql_only", "a", "c")
            await fleet.writes("a", "c")
            await fleet["b"].start()
            await fleet.reaches("sql_only", "b")
            await fleet.writes("b")
            await fleet.reads("postgres")
        assert await fleet.walk() == [(0, 1), (1, 0)]
        await fleet.judge(again=300)
        assert fleet.missed == []


async def stop_one_and_walk_on(fleet):
    """SIGSTOP c in phase 1; the others count it out and walk to 3; requests wait for it; SIGCONT."""
    async with fleet.load():
        await fleet.reads("postgres")
        fleet.stop("c")
        fleet.swap("dynamo_only", phase_force="the scenario")
        await fleet.held("configurations_agree", "a", "b")
        await fleet.reaches("dynamo_only", "a", "b")
        await fleet.writes("a", "b", n=60)
        await fleet.reads("dynamodb", "a", "b")
        async with fleet.waiting_reads("c"):
            fleet.go_on("c")
        await fleet.reaches("dynamo_only", "c")
        await fleet.writes("c")
        await fleet.reads("dynamodb", "c")
    assert await fleet.walk() == [(1, 2), (2, 3)]


async def test_an_instance_that_was_stopped_for_longer_than_the_fence_does_no_harm_when_it_wakes(stand, http):
    """It wakes two phases behind, with requests waiting: it refuses them, stamps nothing old, and joins."""
    async with crew(stand, http, "abc", phase="dual_write") as fleet:
        await stop_one_and_walk_on(fleet)
        await fleet.judge(again=300)
        assert fleet.refused["c", 503, "phase_unknown"] > 0


async def test_without_the_fence_it_would_read_where_nobody_writes_any_more(stand, http):
    """The control: the same with an instance that never fences itself, and the judgement finds it guilty."""
    async with crew(stand, http, "abc", phase="dual_write", unfenced="c") as fleet:
        await stop_one_and_walk_on(fleet)
        with pytest.raises(AssertionError, match="unsafe reads"):
            await fleet.judge(again=300)
