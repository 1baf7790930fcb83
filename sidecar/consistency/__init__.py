"""Whether the two stores hold the same records: exact sets by id and content, both directions, every service.

``validator`` compares, ``explain`` says why something differs, ``whereabouts`` asks the sidecars, ``report`` words it.
What a report means and what to do: docs/CONSISTENCY.md.
"""

from sidecar.consistency.explain import Known, Rules, Whereabouts
from sidecar.consistency.report import document
from sidecar.consistency.types import DIVERGENT, EXPECTED, FIRST_US, UNDECIDED, Difference, Reason, Settled, Window
from sidecar.consistency.validator import Options, Progress, Validator
from sidecar.consistency.whereabouts import Fleet, Mirrored, Nobody, OwnSpool, Together, fates_of_spool

__all__ = [
    "DIVERGENT",
    "EXPECTED",
    "FIRST_US",
    "UNDECIDED",
    "Difference",
    "Fleet",
    "Known",
    "Mirrored",
    "Nobody",
    "Options",
    "OwnSpool",
    "Progress",
    "Reason",
    "Rules",
    "Settled",
    "Together",
    "Validator",
    "Whereabouts",
    "Window",
    "document",
    "fates_of_spool",
]
