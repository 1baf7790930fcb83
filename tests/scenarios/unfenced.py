"""The sidecar without its fence, for a negative control: ``python -m tests.scenarios.unfenced serve ...``.

Production knows no switch for this: the process is changed from outside, before its ``main`` runs. It believes for ever
that it is in touch with the fleet, however long it was stopped.
"""

import sys

from sidecar.__main__ import main
from sidecar.fleet import FleetMember

FleetMember.fenced = property(lambda self: not self._joined)  # type: ignore[method-assign,assignment]

if __name__ == "__main__":
    sys.exit(main())
