"""Somebody else's log event -> a record as ``POST /logs`` takes it. Pure: no I/O, no clock, nothing of HTTP.

::

    body --split--> events --CompiledMapping--> texts of records --sidecar.intake--> the same door as POST /logs
    OTLP --otlp_json | otlp_protobuf--> events --^

* ``split``      the shapes of a body: array, one object, an object around an array, lines; a broken event is one
                 refused event wherever its end can be found
* ``source``     a JSON object's members as source texts; JSON Pointers into them
* ``values``     which value of an event fits which field
* ``times``      ISO 8601 with .NET's seven digits, epoch seconds to nanoseconds -> microseconds
* ``compiled``   one mapping, made ready once per configuration: event -> record text, identity included
* ``ready_made`` the mappings that need no configuration, in the same language
* ``otlp_json``, ``otlp_protobuf``  OTLP's two encodings -> the same events

INVARIANTS

* Nothing is dropped silently. A member of an event leaves ``request_data`` only if a field holds it *exactly*. What is
  cut (a seventh digit), renamed (a level), converted (a number where text is wanted) or does not fit stays there too.
  Values that stay keep their source text: ``1.10`` stays ``1.10``. An event in which a name stands twice is kept whole.
* A value that does not fit its field is no reason to refuse an event: the next path, then the default, then nothing.
  The one exception is time: a wrong time would make every query by time answer wrongly, so an event whose time cannot
  be read is refused.
* One bad event never harms its neighbours: it becomes a ``Refused`` with its source and its place.
* The identity of an event (``identity: content``) is a function of its time, the mapping's name, its bytes and, for
  equal bytes within one request, their number. So a resend is recognised however it is batched anew, and two equal
  events in one request are two. Two equal events in two requests are one: that is the price, and why an event without a
  time of its own is never identified by content.
* No input raises anything but MalformedBody, TooLarge or UnsupportedMedia; no text of an error carries a value.
"""

from sidecar.mapping.compiled import CompiledMapping, Mapped, compile_mapping
from sidecar.mapping.ready_made import OTLP, READY_MADE

__all__ = ["OTLP", "READY_MADE", "CompiledMapping", "Mapped", "compile_mapping"]
