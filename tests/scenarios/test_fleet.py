"""Three sidecars change phase together while one hears late, one dies, and one store is down."""

from tests.parts import oracle
from tests.parts.fault_proxy import FaultProxy, Hang
from tests.parts.tcp_proxy import TcpProxy
from tests.scenarios.crew import crew


async def test_the_fleet_waits_for_the_last_to_hear_and_for_nobody_who_is_dead(quick_stand, http):
    """Swaps at different instants hold the step until the last; a killed instance holds it until it is counted out."""
    async with crew(quick_stand, http, "abc", phase="sql_only") as fleet:
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


async def test_an_instance_that_is_cut_off_from_both_stores_goes_on_accepting_and_the_others_walk_on(quick_stand, http):
    """It refuses reads and owes what it accepts to be decided; back again, that is owed to the phase of then."""
    async with (
        TcpProxy(quick_stand.postgres.host, quick_stand.postgres.port) as sql,
        FaultProxy(quick_stand.dynamodb.endpoint_url) as dynamo,
        crew(
            quick_stand,
            http,
            "abc",
            phase="dual_write",
            own={"c": {"postgres": {"port": sql.port}, "dynamodb": {"endpoint_url": dynamo.url}}},
        ) as fleet,
    ):
        async with fleet.load():
            await fleet.reads("postgres")
            sql.blackhole()
            dynamo.on("*", Hang())
            await fleet.fenced("c")
            known = set(fleet.acked)
            await fleet.writes("c", n=6)
            undecided = {log_id for log_id in fleet.acked.keys() - known if fleet.acked[log_id].startswith("c ")}
            fleet.swap("dynamo_only", phase_force="the scenario")
            await fleet.reaches("dynamo_only", "a", "b")
            await fleet.writes("a", "b")
            assert (await fleet.phase("c"))["fleet"]["fenced"]
            await sql.normal()
            dynamo.clear()
            await fleet.reaches("dynamo_only", "c")
            await fleet.reads("dynamodb")
        await fleet.judge(again=300)
        oracle.assert_holds(await quick_stand.in_dynamodb(), undecided)
        assert fleet.refused["c", 503, "phase_unknown"] > 0
        assert await fleet.walk() == [(1, 2), (2, 3)]
