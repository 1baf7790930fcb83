"""The sidecar with two bugs, for the alerts that tell of bugs: ``python -m tests.integration.k8s.planted serve ...``.

Production knows no switch for them: the process is changed from outside, before its ``main`` runs. A file beside the
pod's own turns each on: ``raise`` makes the next write to PostgreSQL raise what nobody expects, once; while
``miscount`` is there, one record more is owed than the books know of.
"""

import os
import sys
from pathlib import Path
from typing import Any

from sidecar.__main__ import main
from sidecar.metrics import Metrics, Source
from sidecar.stores.postgres import PostgresStore

BUGS = Path(os.environ["SPOOL"]).parents[1]
_write = PostgresStore.write
_observe = Metrics.observe


async def write(self: PostgresStore, *args: Any, **more: Any) -> Any:
    """The first bug."""
    if (BUGS / "raise").exists():
        (BUGS / "raise").unlink()
        raise RuntimeError("planted")
    return await _write(self, *args, **more)


def observe(self: Metrics, name: str, source: Source) -> None:
    """The second."""

    def wrong() -> list[Any]:
        return [(labels, value + (BUGS / "miscount").exists()) for labels, value in source()]

    _observe(self, name, wrong if name == "store_records_owed_total" else source)


PostgresStore.write = write  # type: ignore[method-assign]
Metrics.observe = observe  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main())
