"""The phase table: it is the specification's, and the only place where phases mean anything."""

import itertools

import pytest

from sidecar.errors import ConfigError
from sidecar.phase import DYNAMODB, POSTGRES, STORES, TABLE, Delivery, Phase, adjacent, parse_phase

SPECIFICATION = {  # L524-556; RequireBothWrites is not stated for phases 0 and 3, where one store is written
    Phase.SQL_ONLY: (True, False, False, False),
    Phase.DUAL_WRITE: (True, True, False, False),
    Phase.DUAL_WRITE_READ_DYNAMO: (True, True, True, True),
    Phase.DYNAMO_ONLY: (False, True, True, False),
}
FLAGS = ("writes_to_sql", "writes_to_dynamodb", "reads_from_dynamodb", "require_both_writes")


@pytest.mark.parametrize("phase", Phase)
def test_flags_are_the_specifications(phase):
    """The flags derived from the table are those that the specification lists for the phase."""
    assert tuple(TABLE[phase].flags[name] for name in FLAGS) == SPECIFICATION[phase]


def test_table_has_every_phase_once_under_its_own_name():
    """Each row is the policy of its key."""
    assert list(TABLE) == list(Phase)
    assert all(policy.phase is phase for phase, policy in TABLE.items())


@pytest.mark.parametrize("phase", Phase)
def test_a_phase_reads_from_a_store_that_it_requires(phase):
    """Nobody reads from a store that may lag without limit."""
    assert TABLE[phase].reads_from in TABLE[phase].required


def test_only_dual_write_has_a_best_effort_store():
    """DynamoDB in phase 1 is the one best-effort obligation."""
    found = [(p, s) for p, row in TABLE.items() for s, d in row.writes.items() if d is Delivery.BEST_EFFORT]
    assert found == [(Phase.DUAL_WRITE, DYNAMODB)]


@pytest.mark.parametrize(("a", "b"), list(itertools.product(Phase, Phase)))
def test_adjacent_phases_are_those_that_may_coexist(a, b):
    """Two different phases may coexist iff each reads from a store that the other writes: the adjacent pairs."""
    safe = TABLE[a].reads_from in TABLE[b].owed and TABLE[b].reads_from in TABLE[a].owed
    assert adjacent(a, b) is (a is not b and safe)


@pytest.mark.parametrize("phase", Phase)
def test_every_spelling_is_read(phase):
    """Label, specification's name, number and number as text all mean the phase; blanks round it do not matter."""
    pascal = "".join(word.title() for word in phase.label.split("_"))
    for spelling in (phase.label, pascal, int(phase), str(int(phase)), f" {phase.label} "):
        assert parse_phase(spelling) is phase


@pytest.mark.parametrize(
    "value", [True, False, None, 4, -1, 1.0, "", "4", "SQL_ONLY", "sqlonly", "dual", [], {}, b"1", "\uff11"]
)
def test_anything_else_is_refused(value):
    """A bool, a float, another case or an unknown number is no phase; the error lists the four."""
    with pytest.raises(ConfigError) as caught:
        parse_phase(value, "phase")
    assert caught.value.setting == "phase"
    assert all(phase.label in caught.value.allowed for phase in Phase)


def test_policies_cannot_be_changed():
    """The table and its rows are read-only."""
    with pytest.raises(TypeError):
        TABLE[Phase.SQL_ONLY] = TABLE[Phase.DYNAMO_ONLY]
    with pytest.raises(TypeError):
        TABLE[Phase.SQL_ONLY].writes[DYNAMODB] = Delivery.REQUIRED
    with pytest.raises(AttributeError):
        TABLE[Phase.SQL_ONLY].reads_from = DYNAMODB


def test_stores_are_named_once():
    """The names of the stores are the ones of semantics, each in some phase."""
    assert STORES == (POSTGRES, DYNAMODB) == ("postgres", "dynamodb")
    assert {store for policy in TABLE.values() for store in policy.owed} == set(STORES)
