"""The same question has the same bytes: PostgreSQL, DynamoDB and the model in memory, in every phase, page by page."""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidecar.api import query
from sidecar.phase import Phase
from sidecar.record import LogRecord
from sidecar.settings import Settings
from sidecar.stores.memory import MemoryStore
from tests.api.door import Door, open_door
from tests.parts.reads import ReadsStand
from tests.parts.sidecar import eventually
from tests.stores.records import BASE, DAY, fresh, log_records

TIMES = st.sampled_from([BASE - 1, BASE, BASE, BASE + 1, BASE + DAY - 1, BASE + DAY, BASE + 2 * DAY])
"""Few instants, so that many are equal; both sides of two midnights."""
SPAN = {"start": "2026-01-14T23:59:59.999999Z", "end": "2026-01-17T00:00:00Z"}
PAGED = ("/logs", "/logs/errors")


@dataclass
class World:
    """The real stores and the model behind the same routes, and all that was written to both."""

    real: ReadsStand
    model: ReadsStand
    asked: Door  # of the real stores
    expected: Door  # of the model
    written: list[LogRecord] = field(default_factory=list)

    async def write(self, batch):
        """The same into all."""
        await self.real.write(batch)
        await self.model.write(batch)
        self.written += batch


@pytest.fixture
async def world(tmp_path, postgres_store, dynamodb_store):
    """Both sides, without shadow reads."""
    real = ReadsStand(stores={"postgres": postgres_store, "dynamodb": dynamodb_store})
    model = ReadsStand(stores={"postgres": MemoryStore("postgres"), "dynamodb": MemoryStore("dynamodb")})
    for side in (real, model):
        side.configure(shadow_sample=0.0)
    async with (
        open_door(tmp_path / "real", Settings(), query.routes(real.reads)) as asked,
        open_door(tmp_path / "model", Settings(), query.routes(model.reads)) as expected,
    ):
        yield World(real, model, asked, expected)


def questions(some):
    """Paths that these records answer to, and what they are asked with."""
    for r in some:
        if r.application_id is not None:
            yield "/logs", {"application_id": str(r.application_id)}
        if r.correlation_id is not None:
            yield "/logs", {"correlation_id": r.correlation_id}
        service = {"service_name": r.service_name, **SPAN}
        yield "/logs", service
        yield "/logs/count", service
        yield "/logs/count", {**service, "group_by": "date", "is_success": "false"}
        yield "/logs/count", {**service, "group_by": "service"}
    for day in ("2026-01-14", "2026-01-15", "2026-01-16", "2026-01-17"):
        yield "/logs/errors", {"date": day}
    for group in ({}, {"group_by": "date"}, {"group_by": "service"}, {"group_by": "date", "is_success": "false"}):
        yield "/logs/count", {**SPAN, **group}


async def ask(door, path, asked):
    """All pages as bytes; counts without the moment at which they were made."""
    found = []
    after = None
    while True:
        params = {**asked, **({"cursor": after} if after else {})}
        async with door.client.get(door.listener.url + path, params=params) as answer:
            body = await answer.read()
            assert answer.status == 200, body
            document = await answer.json()
        if "as_of" in document:
            body = body.replace(document["as_of"].encode(), b"now")
        found.append(body)
        after = document.get("next_cursor")
        if after is None:
            return found


@settings(
    max_examples=8,
    deadline=None,
    # The stores outlive the examples on purpose: the model holds what they hold.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    drawn=st.lists(log_records(times=TIMES), min_size=1, max_size=14),
    paging=st.fixed_dictionaries(
        {"limit": st.sampled_from(["1", "2", "5", "100"]), "view": st.sampled_from(["full", "full", "summary"])}
    ),
    seed=st.integers(0, 1000),
)
async def test_every_question_has_the_same_bytes_in_every_phase_from_either_store(world, drawn, paging, seed):
    """Random records with equal times, random questions, every page: byte for byte what the model answers."""
    await world.write(fresh(drawn))
    some = random.Random(seed).sample(world.written, min(3, len(world.written)))
    for path, what in questions(some):
        asked = {**what, **(paging if path in PAGED else {})}
        right = await ask(world.expected, path, asked)
        for phase in Phase:
            world.real.phase = phase

            async def same(path=path, asked=asked, right=right):
                return await ask(world.asked, path, asked) == right

            await eventually(same, what=f"{phase.label} {path} {asked}", seconds=10)
    for phase in Phase:
        world.real.phase = phase
        for r in some:
            assert (await world.real.reads.get(r.log_id)).value == r
