"""What the spool's own parts need of it."""

import sqlite3
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from sidecar.errors import SpoolFailed
from sidecar.spool.framing import Damaged, Header
from sidecar.spool.ledger import Ledger
from sidecar.spool.tail import Tail

_T = TypeVar("_T")


class Parts(Protocol):
    """The spool, seen from inside."""

    ledger: Ledger
    tail: Tail

    @property
    def accepting(self) -> bool:
        """False while appends are pushed back."""
        ...

    async def read(self, run: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run a query in the database thread, after all writes asked for so far."""
        ...

    async def write(
        self,
        run: Callable[[sqlite3.Connection], _T],
        done: Callable[[_T], None] | None = None,
        *,
        refusable: bool = False,
        measured: bool = False,
    ) -> _T:
        """Run a change with the next commit."""
        ...

    def flush_now(self) -> None:
        """Queue the marks."""
        ...

    def now_us(self) -> int:
        """Wall clock, microseconds."""
        ...

    def steady_us(self, wall_us: int) -> int:
        """From the wall clock to the clock that does not jump."""
        ...

    def wall_us(self, steady_us: int) -> int:
        """The inverse."""
        ...

    def marked(self) -> None:
        """Something was settled."""
        ...

    def holds(self, store: str, seq: int) -> bool:
        """True while the store's consumer has the frame."""
        ...

    def check(self) -> None:
        """Raise SpoolFailed where the spool is broken or closed."""
        ...

    def stalled(self, store: str) -> bool:
        """True while the store's leftovers find no room on the disk: nothing more is handed out to it."""
        ...

    def header_damaged(self, header: Header) -> SpoolFailed:
        """A frame's obligation cannot be trusted: stop; the next start salvages."""
        ...

    def keep_damaged(self, name: str, damaged: Sequence[Damaged]) -> None:
        """Have damaged bytes kept in files and counted, once."""
        ...
