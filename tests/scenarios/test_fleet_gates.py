"""Three sidecars walk as far as the gates of the steps let them, and no further; away from a store that is down."""

from datetime import UTC, datetime

from tests.parts.fault_proxy import Reset
from tests.scenarios.crew import crew


async def test_one_store_down_stops_no_step_away_from_it_and_every_step_toward_it(quick_stand, http):
    """DynamoDB resets connections: 2 -> 1 and 1 -> 0 are made, 0 -> 1 is held, and made by itself when it is back."""
    async with crew(quick_stand, http, "abc", phase="dual_write_read_dynamo") as fleet:
        async with fleet.load():
            await fleet.reads("dynamodb")
            await fleet.settles("dual_write_read_dynamo")
            for phase in ("dual_write", "sql_only"):
                quick_stand.dynamo.on("*", Reset())
                fleet.swap(phase)
                await fleet.reaches(phase)
                await fleet.writes()
                await fleet.reads("postgres")
                quick_stand.dynamo.clear()
                await fleet.settles(phase)
            quick_stand.dynamo.on("*", Reset())
            fleet.swap("dual_write")
            await fleet.held("dynamodb_ready")
            await fleet.told("dynamodb_ready")
            await fleet.writes()
            assert {(await fleet.phase(name))["applied"] for name in "abc"} == {"sql_only"}
            quick_stand.dynamo.clear()
            await fleet.reaches("dual_write")
            await fleet.writes()
        assert await fleet.walk() == [(2, 1), (1, 0), (0, 1)]
        await fleet.judge()


async def test_a_jump_is_walked_step_by_step_as_its_gates_turn_green(quick_stand, http):
    """0 -> 3 in the file, under load: held in 1 by the gap, in 2 by the way back; each time it goes on by itself."""
    async with crew(
        quick_stand,
        http,
        "abc",
        phase="sql_only",
        phases={"min_soak": 0},
        validation={"settle": 0, "interval": 0},
        dynamodb={"read_timeout": "10s"},  # the emulator reads whole tables slowly
    ) as fleet:
        fleet.hours = [datetime.now(UTC).strftime("%Y-%m-%dT%H")]  # late writes would overtake what was validated
        async with fleet.load():
            await fleet.writes()
            fleet.swap("dynamo_only")
            await fleet.reaches("dual_write")
            await fleet.held("no_open_gap")
            await fleet.shows_gaps(open_now=True)
            async with fleet.quiet():
                await fleet.command("a", "validate", "--all")
            await fleet.writes()
            assert {(await fleet.phase(name))["applied"] for name in "abc"} == {"dual_write"}
            await fleet.command("a", "backfill", "--from", "postgres", "--to", "dynamodb")
            await fleet.reaches("dual_write_read_dynamo")
            await fleet.reads("dynamodb")
            await fleet.shows_gaps(open_now=False)
            await fleet.held("reverse_feasible")
            await fleet.writes()
            assert {(await fleet.phase(name))["applied"] for name in "abc"} == {"dual_write_read_dynamo"}
            await fleet.command("a", "backfill", "--from", "dynamodb", "--to", "postgres", "--dry-run")
            await fleet.reaches("dynamo_only")
            await fleet.writes()
        assert await fleet.walk() == [(0, 1), (1, 2), (2, 3)]
        await fleet.judge()
