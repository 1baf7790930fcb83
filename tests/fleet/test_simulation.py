"""Whole fleets of the product's own code in virtual time; the oracle is asked after every step."""

import os
from collections import Counter
from collections.abc import Callable

import pytest

from sidecar.fleet import FleetMember, Use, protocol
from sidecar.fleet import census as census_module
from tests.fleet.simulated import UnsafeError
from tests.fleet.simulation import World, simulate

SEEDS = 2_000 if "FAULTS_LONG" in os.environ else 60  # make faults looks at more
CHUNK = 20
ENOUGH = 60  # seeds within which a mutation must be found


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_no_history_is_unsafe_and_every_fleet_recovers(first: int) -> None:
    """Crashes, cuts, freezes, clocks, late requests: no unsafe pair at work, no read that misses, nothing lost."""
    seen: Counter[str] = Counter()
    for seed in range(first, first + CHUNK):
        world = simulate(seed)
        seen += world.seen
        seen["epochs"] += max(world._epochs)
    assert seen["two epochs at work"] > 25 * CHUNK, "histories without a mixed fleet prove nothing"
    assert seen["epochs"] > 5 * CHUNK
    assert seen["reads answered"] > 100 * CHUNK
    assert seen["reads refused"] > CHUNK
    assert seen["gaps closed"] > CHUNK
    assert seen["released"] > CHUNK


def test_five_sidecars_for_an_hour() -> None:
    """The same for a larger fleet and a longer time."""
    world = simulate(1, chaos_s=3600, sidecars=5)
    assert max(world._epochs) > 15


def test_a_seed_is_one_history() -> None:
    """The same seed gives the same log and the same counts, so a failure can be looked at again."""

    def outcome(world: World) -> object:
        return world.log, world.seen, max(world._epochs), world.loop.now

    assert outcome(simulate(7)) == outcome(simulate(7))


def _no_fence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FleetMember, "fenced", property(lambda self: not self._joined))


def _no_wait(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(protocol, "blockers", lambda _claims, _epoch: [])


def _stamps_are_not_taken_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Use, "valid", property(lambda _self: True))


def _claims_do_not_wait_for_requests(patch: pytest.MonkeyPatch) -> None:
    original = FleetMember.settle_in

    async def hasty(self: FleetMember) -> None:
        if self.applied is not None and not self.fenced:
            self._claimed = self.applied.epoch
        await original(self)

    patch.setattr(FleetMember, "settle_in", hasty)


def _gone_too_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(census_module, "MARGIN", -0.9)


MUTATIONS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], bool]] = {
    "no fence": (_no_fence, False),
    "no wait for the last instance": (_no_wait, True),
    "stamps that outlived the fence are kept": (_stamps_are_not_taken_back, True),
    "an epoch is claimed while older requests run": (_claims_do_not_wait_for_requests, True),
    "instances are counted out before their fence falls": (_gone_too_early, True),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_rule_is_found(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each rule taken out of the product's code makes a history unsafe within a few seeds."""
    mutate, fences = MUTATIONS[name]
    mutate(monkeypatch)
    for seed in range(ENOUGH):
        try:
            simulate(seed, fences=fences)
        except UnsafeError as error:
            with capsys.disabled():
                print(f"\n{name}: {str(error).splitlines()[0]}")
            return
    pytest.fail(f"{name}: not found within {ENOUGH} seeds")
