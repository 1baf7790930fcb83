"""Reads: every query of the specification, from the store that the phase names, with the same answer from either.

THE PATH of a read: bounds and allow-list (``service``) -> a slot (``slots``) -> the policy, held until the answer is
given -> a question (``questions``) put to the store that the policy reads from, within ``reads.timeout`` -> the answer,
and with it who served it, under which phase, how consistent, and what this sidecar still owes to that store. A share of
the answers is then compared with the other store's, off this path (``shadow``, ``compare``, ``pace``).

FAILURE AT EACH STAGE: a broken bound or a foreign cursor is the client's (400), a service that is not allowed 403, no
slot or no phase 503, a store's failure 503 and its silence 504, each with the store and the reason. There is no path
from a failure to an empty answer.
"""

from sidecar.reads.service import DEFAULT_LIMIT, Answer, Hold, Numbers, Page, Reads, always
from sidecar.reads.shadow import Shadow

__all__ = ["DEFAULT_LIMIT", "Answer", "Hold", "Numbers", "Page", "Reads", "Shadow", "always"]
