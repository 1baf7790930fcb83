"""Three sidecars change phase together while one hears late, one dies, and one store is down."""

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
