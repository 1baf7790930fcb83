"""The store in memory beyond the contract: it stands in for either store, and tells conflicts as PostgreSQL does."""

import msgspec
import pytest

from sidecar.errors import RetryClass, StoreError
from sidecar.phase import STORES, StoreName
from sidecar.record import LogRecord
from sidecar.stores.base import Store, WriteLimits
from sidecar.stores.memory import MemoryStore
from tests.stores.records import log_id, record, records


@pytest.mark.parametrize("name", STORES)
async def test_it_stands_for_the_store_that_it_is_named_after(name: StoreName) -> None:
    """Name and limits are those given, and the errors carry the name."""
    store: Store = MemoryStore(name, WriteLimits(max_records=2, max_bytes=1024, max_in_flight=1))
    assert (store.name, store.limits.max_records) == (name, 2)
    with pytest.raises(StoreError) as caught:
        await store.write(records(3))
    assert caught.value.store == name


async def test_other_content_under_an_id_is_a_conflict_and_the_first_wins() -> None:
    """Only that record fails; its neighbours are stored; the stored one stays."""
    store = MemoryStore()
    first = record(2, request_data="first")
    await store.write([first])
    result = await store.write([record(1), record(2, request_data="planted"), record(3)])
    assert [(f.index, f.retry_class) for f in result.failures] == [(1, RetryClass.CONFLICT)]
    assert [await store.get(log_id(i)) for i in (1, 2, 3)] == [record(1), first, record(3)]
    assert "planted" not in repr(result)


@pytest.mark.parametrize("field", LogRecord.__struct_fields__[1:])
async def test_a_difference_in_any_field_is_a_conflict(field: str) -> None:
    """The comparison leaves no field out."""
    others = {int: 8, str: "x", bool: False, type(None): "y"}
    one = record(1)
    store = MemoryStore()
    await store.write([one])
    result = await store.write([msgspec.structs.replace(one, **{field: others[type(getattr(one, field))]})])
    assert [f.retry_class for f in result.failures] == [RetryClass.CONFLICT]
