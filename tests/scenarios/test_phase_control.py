"""Phase control from outside: one process of a fleet, real stores, real evidence, and what an operator sees of it."""

from typing import Any

import aiohttp

from tests.parts import oracle
from tests.parts.sidecar import Sidecar, eventually

FLEET = {"enabled": True, "heartbeat": "300ms", "fence_after": "3s"}


async def post(http: aiohttp.ClientSession, sidecar: Sidecar, n: int = 1) -> list[str]:
    """Records, acknowledged."""
    body = [{"service_name": "phase-control", "request_data": str(i)} for i in range(n)]
    async with http.post(f"{sidecar.url}/logs", json=body) as answer:
        assert answer.status == 202, await answer.text()
        return (await answer.json())["log_ids"]


async def phase_of(sidecar: Sidecar) -> dict[str, Any]:
    """The part of /status about the phase."""
    return (await sidecar.json("/status"))["phase"]


async def test_an_instance_of_a_fleet_walks_step_by_step_and_loses_nothing(stand, http):
    """0 to 3 and back to 0 through the fleet record: every acknowledged record is where its phase owes it."""
    sidecar = await stand.sidecar(phase="sql_only", fleet=FLEET).start()
    ids: dict[str, list[str]] = {}
    for phase in ("sql_only", "dual_write", "dual_write_read_dynamo", "dynamo_only"):
        sidecar.configure(phase=phase)

        async def applied(phase=phase) -> bool:
            return (await phase_of(sidecar))["applied"] == phase

        await eventually(applied, what=phase)
        ids[phase] = await post(http, sidecar, 20)
    await sidecar.drained()
    sql, dynamo = await stand.in_postgres(), await stand.in_dynamodb()
    oracle.assert_holds(sql, [*ids["sql_only"], *ids["dual_write"], *ids["dual_write_read_dynamo"]])
    oracle.assert_holds(dynamo, [*ids["dynamo_only"], *ids["dual_write"], *ids["dual_write_read_dynamo"]])
