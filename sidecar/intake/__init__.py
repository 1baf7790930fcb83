"""The whole write path: a body -> records -> the spool, owed to whom the phase says; and what became of each record.

STAGES, and what a failure at each leaves behind

1. ``Busy`` before the body is looked at: stopping, fail-closed. Nothing was read, nothing stored.
2. Screening (``sidecar.screening``). A body that is not what it claims to be, or a single record that breaks a rule:
   raised, nothing stored. In a batch the good records go on; the others are answered one by one and kept as
   ``refused`` dead letters (``strict`` stops here instead, with nothing stored or kept).
3. The dedup window (``window``), for ids that the client supplied or that an Idempotency-Key derives: the same content
   is a duplicate, without a second effect; other content is refused, the first wins. A duplicate of a record that is
   still on its way to disk waits for that commit, and stands in its place if it fails.
4. ``spool.append``: one call, one commit, all the records of the request (P1). ``Busy`` or ``SpoolFailed``: nothing of
   the request is stored, the window does not learn of it. In a fleet the stamp is held until the commit is over
   (``Hold``); if this instance has lost touch meanwhile, the records are appended once more, undecided, before anybody
   is answered: a second delivery has no effect, a record that the fleet's phase does not look for would be lost to it.
5. Waiting for the stores, if the client prefers: the records are durable whatever comes of it.

PLAIN RECORDS (one a request, good at the first look, with an id of ours or one that nobody has seen) of requests that
arrive together are appended together: stage 4 once for all of them, all or none. Where stage 3 has anything to say
about one of them, each goes its own way.

The policy is read once per request, at 4, so that all its records are owed to the same stores.
"""

from sidecar.intake.door import Intake, Outcome, Plain, SpoolDoor
from sidecar.intake.standing import Firm, Hold, Standing
from sidecar.intake.window import DedupWindow

__all__ = ["DedupWindow", "Firm", "Hold", "Intake", "Outcome", "Plain", "SpoolDoor", "Standing"]
