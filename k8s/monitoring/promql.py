"""The few PromQL shapes that rules and panels share, and the scale of every duration in the rules.

All series of one application share the labels ``namespace`` and ``app`` and differ in ``pod``: the PodMonitor sets
them. Durations are never written into an expression by hand: they come from a :class:`Scale`, so that the very same
rules can be watched firing and clearing within seconds.
"""

import math
from dataclasses import dataclass
from typing import Final

JOB: Final = "hybrid-log-sidecar"
APP: Final = "namespace, app"
POD: Final = "namespace, app, pod"
PHASES: Final = ("sql_only", "dual_write", "dual_write_read_dynamo", "dynamo_only")
"""In the order of their numbers, 0 to 3."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Turns the durations of production into those of a test run.

    Attributes:
        factor: what every duration is multiplied with; 1 in production.
        shortest_window: seconds; a range below it would hold too few scrapes to say anything.
        longest: seconds; a range, an offset or a `for` that stays above it, the days and weeks, is cut to it.
    """

    factor: float = 1.0
    shortest_window: float = 0.0
    longest: float = math.inf

    def seconds(self, value: float) -> str:
        """A threshold in seconds, as PromQL writes a number."""
        return f"{value * self.factor:.12g}"

    def window(self, value: float) -> str:
        """A range or an offset of that many seconds, as PromQL writes a duration."""
        return duration(max(min(value * self.factor, self.longest), self.shortest_window))

    def hold(self, value: float) -> str:
        """How long an alert must stay true before it fires (``for``)."""
        return duration(min(value * self.factor, self.longest))


_UNITS: Final = ((86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1_000, "s"), (1, "ms"))


def duration(seconds: float) -> str:
    """A duration in Prometheus' notation, in the largest unit that divides it: ``15m``, ``90s``, ``0s``."""
    milliseconds = round(seconds * 1000)
    if milliseconds == 0:
        return "0s"
    return next(f"{milliseconds // size}{unit}" for size, unit in _UNITS if milliseconds % size == 0)


def grown(metric: str, by: str, window: str) -> str:
    """True where a durable counter grew within the window; one that was not there before counts from zero.

    ``increase`` misses a counter that first shows up with a value, which is what a counter kept on disk does after
    its pod came back under another address.
    """
    now = f"sum by ({by}) ({metric})"
    return f"{now} - (sum by ({by}) ({metric} offset {window}) or {now} * 0) > 0"


def counted(metric: str, by: str, window: str) -> str:
    """True where a counter of this process counted within the window, its very first event included.

    A labelled counter first shows up with the value 1; ``increase`` alone would miss just the event that matters.
    """
    return (
        f"sum by ({by}) (increase({metric}[{window}])) > 0"
        f" or sum by ({by}) ({metric} unless {metric} offset {window}) > 0"
    )
