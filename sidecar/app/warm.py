"""What is long-lived is made once, early, and then left out of the garbage collector's rounds.

The AWS client library builds some 100,000 objects at its first use; a full collection over them takes up to 0.1 s, in
which nobody is answered. So the stores are used once after the start, what lives then is frozen, and collections
become rare: the hot path makes hardly any cycles.
"""

import asyncio
import gc
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from sidecar.errors import StoreError
from sidecar.stores.base import Store

_THRESHOLDS: Final = (50_000, 20, 50)  # allocations, younger rounds: a full round after some 50 million allocations
_PATIENCE: Final = 15.0  # seconds


async def warm(stores: Sequence[Store]) -> None:
    """Use each store once (a store that is down costs nothing but its time), then freeze what is there."""
    for store in stores:
        with suppress(StoreError, TimeoutError):  # delivery will say what is wrong with it
            async with asyncio.timeout(_PATIENCE):
                await store.ping()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
