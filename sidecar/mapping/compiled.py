"""One mapping made ready: event -> the text of a record as ``POST /logs`` takes it.

ORDER within an event: fields from their paths or defaults; the level, where it does not contradict a field's own path;
fields that only a failure fills; the time; what is left becomes ``request_data``; last the identity.

COST: nothing is decoded that no path names; about 6 us an event of ten members.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec
from msgspec import Raw

from sidecar.declared_mapping import DeclaredMapping, FieldSource, LevelSource
from sidecar.errors import ConfigError, MalformedBody
from sidecar.mapping.source import Members, child, first_members, pointer
from sidecar.mapping.times import FIELD, TimeReader
from sidecar.mapping.values import MAPPED, READERS, Reader, scalar
from sidecar.record import timestamp_text
from sidecar.screening import Refused, Rule
from sidecar.screening.schema import RULES, Refusal

ENVELOPE: Final = "envelope"
"""The member of an event under which the members beside the array of events stand."""
_TOO_DEEP: Final = "arrays and objects nest too deep to be read"
_MISSING: Final = object()
_PERSON: Final = b"sidecar-event-1"  # BLAKE2b personalisation: changing it changes every derived id
_MS_MAX: Final = 2**48 - 1
_WIDEST_RANGE: Final = 1_000
_BETWEEN_PAUSES: Final = 128  # events
_TIMES_KEPT: Final = 1_024  # seconds whose text is remembered
_encode: Final = msgspec.json.Encoder().encode
_LOG_TYPE: Final = RULES["log_type"]

Path = tuple[tuple[str, ...], str]  # the parents' names, the member's
Taken = list[tuple[Path, Members]]  # what fields hold exactly: where it stands, and in which object


class _Rule(NamedTuple):
    """One field, how it is read, and where from."""

    field: str
    read: Reader
    paths: tuple[Path, ...]

    def fill(self, record: dict[str, object], event: Members, taken: Taken | None) -> bool:
        """Put the first value that fits into ``record``; False where there is none."""
        for path in self.paths:
            node = event if not path[0] else _parent(event, path[0])
            leaf = _MISSING if node is None else node.get(path[1], _MISSING)
            found = None if leaf is _MISSING else self.read(leaf)
            if node is None or found is None:
                continue
            record[self.field] = found[0]
            if found[1] and taken is not None:
                taken.append((path, node))
            return True
        return False


@dataclass(slots=True)
class Mapped:
    """The events of one request: ``texts`` are records, with their ``sources`` and ``indexes``; and the refused."""

    total: int = 0
    indexes: list[int] = field(default_factory=list)
    texts: list[bytes] = field(default_factory=list)
    sources: list[bytes] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


class CompiledMapping:
    """See the module. One per configuration; used from one thread."""

    def __init__(self, name: str, declared: DeclaredMapping) -> None:
        """``declared`` stands by itself: nothing of it is extended.

        Raises:
            ConfigError: names the setting under ``mappings``.
        """
        self.name = name
        self.events = declared.events or ()
        fields = dict(declared.fields)
        self._defaults: dict[str, object] = {}
        self._always: list[_Rule] = []
        self._on_failure: list[_Rule] = []
        time = fields.pop(FIELD, None) or FieldSource()
        self._time = TimeReader(time.formats or ("iso",), time.offset)
        self._time_paths = _paths(f"mappings.{name}.{FIELD}", time)
        for each, source in fields.items():
            setting = f"mappings.{name}.{each}"
            if each not in MAPPED or source is None:
                raise ConfigError(setting, seen="a field that no path fills", allowed=", ".join(MAPPED))
            reader, paths = READERS[each], _paths(setting, source)
            if source.default is not None:
                self._defaults[each] = _constant(setting, reader, source)
            if paths:
                (self._on_failure if source.on_failure else self._always).append(_Rule(each, reader, paths))
        level = declared.level or LevelSource()
        self._level_paths = _level_paths(name, level)
        self._names = _level_names(name, level)
        self._failure = frozenset(each.casefold() for each in level.failure or ())
        self._by_content = declared.identity == "content"
        self._prefix = hashlib.blake2b(f"{name}\0".encode(), digest_size=16, person=_PERSON)
        self._seconds: dict[int, str] = {}

    # -- whole requests --------------------------------------------------------------------------------------------

    def steps(self, pieces: Iterable[bytes], envelope: bytes, mapped: Mapped) -> Iterator[None]:
        """Map events given as source texts into ``mapped``; yields where it may pause for others."""
        beside = Raw(envelope) if envelope else None
        met: dict[bytes, int] = {}
        for index, piece in enumerate(pieces):
            if index % _BETWEEN_PAUSES == _BETWEEN_PAUSES - 1:
                yield
            try:
                event, twice = first_members(piece)
                if not piece.isascii():
                    piece.decode()
                if beside is not None:
                    event.setdefault(ENVELOPE, beside)
                self.add(mapped, index, event, piece, met=met, beside=envelope, whole=twice)
            except Refusal as why:
                mapped.refused.append(Refused(index, why.field, why.rule, why.reason, piece))
            except MalformedBody as why:
                mapped.refused.append(Refused(index, "record", Rule.MALFORMED, f"this event: {why}", piece))
            except UnicodeDecodeError:
                mapped.refused.append(Refused(index, "record", Rule.MALFORMED, "this event: not UTF-8", piece))
            except RecursionError:
                mapped.refused.append(Refused(index, "record", Rule.DEPTH, _TOO_DEEP, piece))
            mapped.total = index + 1

    def add(
        self,
        mapped: Mapped,
        index: int,
        event: Members,
        source: bytes,
        *,
        met: dict[bytes, int],
        beside: bytes = b"",
        whole: bool = False,
    ) -> None:
        """Map one event whose bytes are ``source`` (and, ``beside`` it, its request's).

        ``met`` counts the equal events of the request; ``whole``: request_data is all of ``source``, because ``event``
        is not. Raises Refusal.
        """
        record, moment = self.record(event)
        if whole:
            record["request_data"] = {"event": Raw(source), ENVELOPE: Raw(beside)} if beside else Raw(source)
        if self._by_content and moment is not None and "log_id" not in record:
            record["log_id"] = self._identify(source + beside, moment, met)
        mapped.indexes.append(index)
        mapped.texts.append(_encode(record))
        mapped.sources.append(source)

    # -- one event ---------------------------------------------------------------------------------------------------

    def record(self, event: Members) -> tuple[dict[str, object], int | None]:
        """The fields of a record, and its own time in microseconds, if it has one.

        Takes from ``event`` what the fields hold exactly; what is left is ``request_data``.

        Raises:
            Refusal: its time cannot be read.
        """
        record = dict(self._defaults)
        taken: Taken = []
        stated = [rule.field for rule in self._always if rule.fill(record, event, taken)]
        if self._level_paths:
            self._read_level(record, event, taken, stated)
        if self._on_failure and record.get("is_success") is False:
            for rule in self._on_failure:
                rule.fill(record, event, None)
        moment = self._read_time(record, event, taken)
        for path, node in taken:
            node.pop(path[1], None)
            if not node and path[0]:
                _prune(event, path[0])
        if event:
            record["request_data"] = event
        return record, moment

    def _read_time(self, record: dict[str, object], event: Members, taken: Taken) -> int | None:
        for path in self._time_paths:
            node = _parent(event, path[0])
            found = self._time.read(node[path[1]]) if node is not None and path[1] in node else None
            if node is not None and found is not None:
                record[FIELD] = self._time_text(found[0])
                if found[1]:
                    taken.append((path, node))
                return found[0]
        return None

    def _read_level(self, record: dict[str, object], event: Members, taken: Taken, stated: Sequence[str]) -> None:
        """``stated`` are the fields that a path of their own filled: those a level does not touch."""
        for path in self._level_paths:
            node = _parent(event, path[0])
            value = None if node is None else scalar(node.get(path[1]))
            if node is None or value is None or isinstance(value, bool):
                continue
            log_type = self._names.get(str(value).casefold())
            if log_type is None:
                if not isinstance(value, str) or not 0 < len(value) <= (_LOG_TYPE.max_length or 0) or "\0" in value:
                    continue
                log_type = value
            if "log_type" not in stated:
                record["log_type"] = log_type
                if log_type == value:
                    taken.append((path, node))
            break
        if "is_success" not in stated:
            log_type = str(record.get("log_type", ""))
            record["is_success"] = log_type.casefold() not in self._failure

    def _time_text(self, moment: int) -> str:
        second, rest = divmod(moment, 1_000_000)
        text = self._seconds.get(second)
        if text is None:
            if len(self._seconds) >= _TIMES_KEPT:
                self._seconds.clear()
            text = self._seconds[second] = timestamp_text(second * 1_000_000)[:19]
        return f"{text}.{rest:06d}Z"

    def _identify(self, source: bytes, moment: int, met: dict[bytes, int]) -> str:
        """A UUIDv8 of the event's time, the mapping's name, the event and, for all but the first of equals, its number.

        48 bits of milliseconds come first, as in a UUIDv7, so that records of one time lie together in an index; 74
        bits of the hash follow.
        """
        hashed = self._prefix.copy()
        hashed.update(source)
        digest = hashed.digest()
        number = met[digest] = met.get(digest, -1) + 1
        if number:
            hashed.update(b"\0%d" % number)
            digest = hashed.digest()
        time, text = f"{moment // 1000 & _MS_MAX:012x}", digest.hex()
        return f"{time[:8]}-{time[8:]}-8{text[13:16]}-{'89ab'[digest[8] & 3]}{text[17:20]}-{text[20:]}"


def _parent(event: Members, names: tuple[str, ...]) -> Members | None:
    node: Members | None = event
    for name in names:
        if node is None:
            return None
        node = child(node, name)
    return node


def _prune(event: Members, names: tuple[str, ...]) -> None:
    """Take away objects that nothing is left of."""
    while names:
        node = _parent(event, names[:-1])
        if node is None or node.get(names[-1]) != {}:
            return
        del node[names[-1]]
        names = names[:-1]


# -- making ready ----------------------------------------------------------------------------------------------------


def _pointers(setting: str, texts: Iterable[str]) -> tuple[Path, ...]:
    found: list[Path] = []
    for text in texts:
        try:
            tokens = pointer(text)
        except ValueError as error:
            raise ConfigError(f"{setting}.from", seen=text[:60], allowed=str(error), hint="correct the path") from None
        found.append((tokens[:-1], tokens[-1]))
    return tuple(found)


def _paths(setting: str, source: FieldSource) -> tuple[Path, ...]:
    return _pointers(setting, source.paths)


def _level_paths(name: str, level: LevelSource) -> tuple[Path, ...]:
    return _pointers(f"mappings.{name}.level", level.paths or ())


def _constant(setting: str, reader: Reader, source: FieldSource) -> object:
    found = reader(source.default)
    if found is None:
        raise ConfigError(
            setting,
            seen=str(source.default)[:60],
            allowed="a constant that the field may hold (docs/API.md)",
            hint="correct the constant",
        )
    return found[0]


def _level_names(name: str, level: LevelSource) -> dict[str, str]:
    names: dict[str, str] = {}
    for written, log_type in level.names or ():
        setting = f"mappings.{name}.level.names.{written[:40]}"
        if not _LOG_TYPE.min_length <= len(log_type) <= (_LOG_TYPE.max_length or 0):
            raise ConfigError(
                setting, seen=f"{len(log_type)} characters", allowed="a log_type: 1 to 50", hint="shorten it"
            )
        first, dash, last = written.partition("-")
        if dash and first.isascii() and first.isdigit() and last.isascii() and last.isdigit() and len(written) < 20:  # noqa: PLR2004
            if not 0 <= int(last) - int(first) <= _WIDEST_RANGE:
                raise ConfigError(
                    setting, seen=written, allowed=f"a rising range of at most {_WIDEST_RANGE}", hint="correct it"
                )
            names.update((str(number), log_type) for number in range(int(first), int(last) + 1))
        else:
            names[written.casefold()] = log_type
    return names


def compile_mapping(name: str, declared: DeclaredMapping, base: DeclaredMapping | None) -> CompiledMapping:
    """The mapping that ``declared`` makes of the one that it extends. Raises ConfigError."""
    return CompiledMapping(name, declared if base is None else _over(declared, base))


def _over(declared: DeclaredMapping, base: DeclaredMapping) -> DeclaredMapping:
    fields = dict(base.fields) | dict(declared.fields)
    mine, theirs = declared.level or LevelSource(), base.level or LevelSource()
    return DeclaredMapping(
        fields=tuple((each, source) for each, source in fields.items() if source is not None),
        level=LevelSource(
            paths=theirs.paths if mine.paths is None else mine.paths,
            names=theirs.names if mine.names is None else mine.names,
            failure=theirs.failure if mine.failure is None else mine.failure,
        ),
        events=base.events if declared.events is None else declared.events,
        identity=declared.identity or base.identity,
    )
