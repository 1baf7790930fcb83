"""Computed ids: reversible, free of collisions, in the order of the keys, and the same in SQL."""

import uuid

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar import settings
from sidecar.stores.computed_ids import BIAS, MAX_TAG, ComputedIds
from tests.parts.postgres import connect

EDGES = (-BIAS, -(2**31), -1, 0, 1, 42, 2**31 - 1, 2**31, BIAS - 1)
keys = st.sampled_from(EDGES) | st.integers(-BIAS, BIAS - 1)
tags = st.sampled_from((0, 1, MAX_TAG)) | st.integers(0, MAX_TAG)


@given(tag=tags, key=keys)
def test_an_id_gives_back_its_key(tag: int, key: int) -> None:
    """Any tag, any key: a canonical UUIDv8 of RFC 9562's variant, from which the key is read again."""
    ids = ComputedIds(tag)
    made = uuid.UUID(ids.of(key))
    assert (made.version, made.variant) == (8, uuid.RFC_4122)
    assert ids.of(key) == str(made)
    assert ids.key(str(made)) == key


@given(one=st.tuples(tags, keys), other=st.tuples(tags, keys))
def test_two_rows_share_an_id_only_if_they_are_one(one: tuple[int, int], other: tuple[int, int]) -> None:
    """Equal ids mean equal tag and key; and another table's id names no row of this one."""
    ids = [ComputedIds(tag).of(key) for tag, key in (one, other)]
    assert (ids[0] == ids[1]) == (one == other)
    assert (ComputedIds(one[0]).key(ids[1]) is None) == (one[0] != other[0])


@given(tag=tags, one=keys, other=keys)
def test_ids_are_ordered_as_their_keys_are(tag: int, one: int, other: int) -> None:
    """As texts and as numbers, which is how the stores compare them."""
    ids = ComputedIds(tag)
    assert (ids.of(one) < ids.of(other)) == (one < other)
    assert (uuid.UUID(ids.of(one)) < uuid.UUID(ids.of(other))) == (one < other)


@given(st.uuids())
def test_any_other_uuid_has_no_key(other: uuid.UUID) -> None:
    """Ids that clients or the sidecar make are not taken for rows."""
    assert ComputedIds(1).key(str(other)) is None


@pytest.mark.parametrize("variant", ["0", "4", "c", "f"])
def test_another_variant_has_no_key(variant: str) -> None:
    """The mark and the tag alone are not enough."""
    assert ComputedIds(1).key(f"51deca70-0001-8000-{variant}000-00000000002a") is None


def test_people_read_the_key_at_the_end() -> None:
    """The format is on disk in two databases: it never changes."""
    assert ComputedIds(1).of(42) == "51deca70-0001-8000-a000-00000000002a"
    assert ComputedIds(0xBEEF).of(-1) == "51deca70-beef-8000-9fff-ffffffffffff"


@pytest.mark.parametrize("key", [-BIAS - 1, BIAS])
def test_a_key_out_of_range_is_refused(key: int) -> None:
    """Never an id that is another row's."""
    with pytest.raises(ValueError, match="no computed id"):
        ComputedIds(1).of(key)


async def test_sql_computes_the_same(postgres_empty: settings.Postgres) -> None:
    """Both expressions, on the edges and on ids that are none; the first may stand in an index."""
    admin = await connect(postgres_empty)
    try:
        for tag in (0, 1, MAX_TAG):
            ids = ComputedIds(tag)
            for key in EDGES:
                row = await admin.fetchrow(
                    f"SELECT {ids.sql('k')} AS id, {ids.sql_key(ids.sql('k'))} AS key FROM (SELECT $1::int8 AS k) t",
                    key,
                )
                assert (str(row["id"]), row["key"]) == (ids.of(key), key)
        for other in (
            "51deca70-0001-8000-4000-00000000002a",
            "51deca70-0002-8000-a000-00000000002a",
            str(uuid.uuid4()),
        ):
            assert await admin.fetchval(f"SELECT {ComputedIds(1).sql_key('$1::uuid')}", other) is None
        await admin.execute('CREATE TABLE t ("LogId" integer)')
        await admin.execute(f"""CREATE INDEX ON t (({ComputedIds(1).sql('"LogId"')}))""")
        with pytest.raises(asyncpg.NumericValueOutOfRangeError):
            await admin.fetchval(f"SELECT {ComputedIds(1).sql('$1::int8')}", -(2**63))
    finally:
        await admin.close()
