"""Progress on stderr: how far, how fast, how long still.

One line that is rewritten on a terminal, else one every ten seconds, so that a pod's log stays short.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Final, TextIO

_WINDOW: Final = 10.0  # seconds over which the rate is measured
_TERMINAL_EVERY: Final = 0.2  # seconds
_LOG_EVERY: Final = 10.0


class Progress:
    """``show`` as often as you like; ``close`` ends the line."""

    def __init__(
        self, what: str, *, stream: TextIO | None = None, now: Callable[[], float] = time.monotonic, quiet: bool = False
    ) -> None:
        """``what`` stands first, e.g. ``delivered``. ``quiet``: nothing unless on a terminal."""
        self._what = what
        self._stream = stream or sys.stderr
        self._now = now
        self._terminal = self._stream.isatty()
        self._silent = quiet and not self._terminal
        self._seen: deque[tuple[float, int]] = deque()
        self._shown_at = -math.inf
        self._width = 0

    def rate(self) -> float:
        """Records per second over the last ten seconds."""
        if len(self._seen) < 2:  # noqa: PLR2004  (two points make a rate)
            return 0.0
        (start, first), (end, last) = self._seen[0], self._seen[-1]
        return max(0.0, last - first) / max(end - start, 1e-6)

    def show(self, done: int, left: int | None, note: str = "") -> None:
        """``done`` so far, ``left`` to do (None: unknown)."""
        now = self._now()
        self._seen.append((now, done))
        while self._seen[0][0] < now - _WINDOW and len(self._seen) > 2:  # noqa: PLR2004  (as above)
            self._seen.popleft()
        if self._silent or now - self._shown_at < (_TERMINAL_EVERY if self._terminal else _LOG_EVERY):
            return
        self._shown_at = now
        self._write(self.line(done, left, note))

    def line(self, done: int, left: int | None, note: str = "") -> str:
        """The text."""
        rate = self.rate()
        parts = [f"{self._what} {done:,}"]
        if left is not None:
            total = done + left
            parts[0] += f" of {total:,} ({100 * done / total if total else 100:.1f} %)"
        parts.append(f"{rate:,.0f}/s")
        if left:
            parts.append(f"ETA {duration(left / rate)}" if rate > 0 else "ETA unknown: nothing gets through")
        if note:
            parts.append(note)
        return ", ".join(parts)

    def close(self) -> None:
        """End the rewritten line."""
        if self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0

    def _write(self, text: str) -> None:
        if self._terminal:
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 5 min``, ``4 d 3 h``."""
    whole = math.ceil(seconds)
    for size, unit, part, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"
