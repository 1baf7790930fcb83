"""The door's judgement: bytes of a request -> records that both stores hold exactly, or the field and the reason.

A record that not *both* stores can hold exactly is refused here, whatever the phase, so that no store ever has to
(semantics, section 1). What is judged, and where:

* ``schema``      the thirteen fields as one table: spellings, types, bounds
* ``timestamps``  RFC 3339 with an offset -> microseconds since the epoch, UTC
* ``identity``    ids: minted UUIDv7, derived UUIDv8, the canonical spelling of a client's own
* ``scan``        where things are in a JSON text, without recursion and without building anything
* ``shapes``      one record, an array, an envelope, lines
* ``exact``       the slow lane: one record, member by member; the only place that words a refusal
* ``screener``    the fast lane over whole batches, and what sends a record to the slow one

INVARIANTS

* Both lanes agree on every input (``tests/test_screening.py`` proves it on random ones). The fast lane may only
  doubt, never refuse: each refusal comes from ``exact``.
* A payload (``request_data``, ``response_data``) given as a JSON string is the decoded text; given as any other JSON
  value it is that value's source text, byte for byte, never re-encoded; ``null`` is null.
* The content digest covers the canonical form of the fields as the client sent them, before defaults: a resend that
  leaves out ``log_timestamp`` twice is the same content although the default differs.
* No text of a refusal carries a value of the record; at most the name of an unknown member, cut to 64 characters.
* No input raises anything but MalformedBody, TooLarge or InvalidRecord. Nesting, however deep, costs no recursion.
"""

from sidecar.screening.exact import Bounds
from sidecar.screening.identity import Minter, check_key, derive_ids
from sidecar.screening.schema import Refused, Rule
from sidecar.screening.screener import Form, Screened, Screener

__all__ = ["Bounds", "Form", "Minter", "Refused", "Rule", "Screened", "Screener", "check_key", "derive_ids"]
