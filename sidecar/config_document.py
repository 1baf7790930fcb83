"""From a path to a plain tree of texts, whatever bytes lie there: bounded, never blocking, never executing.

The first of two steps of reading config.yaml; ``config_values`` gives the texts their types.

INVARIANTS

* Only a regular file is read, opened without waiting (a FIFO or a device never blocks), at most ``MAX_BYTES``.
* YAML is read event by event; no tag is obeyed and no implicit type is guessed: every scalar stays the text that
  was written, so ``no``, ``010``, ``1:30`` and ``1e3`` mean what the setting's own type says they mean.
* Anchors expand to at most ``MAX_NODES`` nodes through at most ``MAX_ALIASES`` aliases, nesting to ``MAX_DEPTH``:
  a bomb is refused while it is counted, before anything is built from it.
* A key twice, a merge key, a second document, a tag, a key that is no text: refused, with the line.

FAILURE: any bytes and any state of the path end in a tree or in one ConfigError; it never quotes a line of the file,
because the line may hold a password.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import yaml

from sidecar.errors import ConfigError

MAX_BYTES: Final = 1024 * 1024  # what a ConfigMap can hold
MAX_NODES: Final = 10_000
MAX_ALIASES: Final = 64
MAX_DEPTH: Final = 16
MAX_KEY: Final = 128  # characters

_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where PyYAML was built with it
_NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value as it was written; ``plain`` means without quotes, ``where`` where a person finds it."""

    text: str
    plain: bool
    where: str

    @property
    def is_null(self) -> bool:
        """Whether nothing is stated: empty, ``~`` or ``null`` without quotes."""
        return self.plain and self.text in _NULLS


@dataclass(frozen=True, slots=True)
class Listing:
    """A sequence."""

    items: "list[Node]" = field(default_factory=list)
    where: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping with text keys in the order of the file."""

    entries: "dict[str, Node]" = field(default_factory=dict)
    where: str = ""


Node = Scalar | Listing | Table


def read_bounded(path: str) -> bytes:
    """The content of the regular file at ``path``, at most ``MAX_BYTES``; never waits for a writer.

    Raises:
        ConfigError: nothing there, no permission, not a regular file, too large, or the disk refuses.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _unreadable(path, error) from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise ConfigError(
                path, seen=_file_kind(mode), allowed="a regular file", hint="name the file, e.g. config.yaml"
            )
        chunks: list[bytes] = []
        left = MAX_BYTES + 1
        while left and (chunk := os.read(descriptor, left)):
            chunks.append(chunk)
            left -= len(chunk)
    except OSError as error:
        raise _unreadable(path, error) from None
    finally:
        os.close(descriptor)
    if not left:
        raise ConfigError(
            path, seen="more than 1 MiB", allowed="at most 1 MiB", hint="this is no configuration of the sidecar"
        )
    return b"".join(chunks)


def _unreadable(path: str, error: OSError | ValueError) -> ConfigError:
    code = errno.errorcode.get(error.errno or 0, "error") if isinstance(error, OSError) else "a NUL character"
    text = error.strerror if isinstance(error, OSError) else "no file has such a name"
    return ConfigError(path, seen=f"{code}: {text}", allowed="a readable file", hint="check the path and its mode")


def _file_kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    )
    return next((name for test, name in kinds if test(mode)), "a special file")


def parse(data: bytes, source: str) -> Table:
    """The tree of one YAML (or JSON) document whose root is a mapping.

    Raises:
        ConfigError: anything else, with ``source`` as the setting and the line where it went wrong.
    """
    text = _decode(data, source)
    try:
        root = _Builder(source).build(_events(text))
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else "end of file"
        # Only the parser's own words: its snippet of the line may hold a password.
        problem = re.sub(r"'[^']*'", "'...'", error.problem or "syntax error")
        raise ConfigError(source, seen=f"{problem}, {line}", allowed="YAML or JSON", hint="correct the line") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # Characters outside YAML, and numbers in escapes or directives that PyYAML's own scanner chokes on.
        raise ConfigError(
            source, seen=type(error).__name__, allowed="YAML or JSON", hint="remove characters that are no text"
        ) from None
    if isinstance(root, Scalar) and root.is_null:
        raise ConfigError(
            source, seen="nothing", allowed="a mapping of settings", hint="write {} where defaults are wanted"
        )
    if not isinstance(root, Table):
        kind = "a list" if isinstance(root, Listing) else "a single value"
        raise ConfigError(source, seen=kind, allowed="a mapping of settings", hint="write `name: value` lines")
    return root


def _decode(data: bytes, source: str) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ConfigError(source, seen="UTF-16", allowed="UTF-8", hint="save the file as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            source,
            seen=f"byte 0x{data[error.start]:02x} at offset {error.start}",
            allowed="UTF-8",
            hint="save as UTF-8",
        ) from None
    if "\0" in text:
        raise ConfigError(
            source, seen=f"a NUL character at offset {text.index(chr(0))}", allowed="text", hint="restore the file"
        )
    return text


def _events(text: str) -> Iterator[yaml.Event]:
    loader = _LOADER(text)
    try:
        while loader.check_event():
            yield loader.get_event()
    finally:
        loader.dispose()


@dataclass(slots=True)
class _Open:
    """A collection whose end has not come yet."""

    node: Listing | Table
    anchor: str | None
    nodes_before: int
    key: str | None = None  # of a mapping: the key that waits for its value


class _Builder:
    """Builds the tree from events; counts what it would become with every alias expanded."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._stack: list[_Open] = []
        self._anchors: dict[str, tuple[Node, int]] = {}  # node and how many nodes it stands for
        self._nodes = 0
        self._aliases = 0
        self._root: Node | None = None
        self._documents = 0

    def build(self, events: Iterator[yaml.Event]) -> Node:
        """Consume the events; an empty stream is a null scalar."""
        for event in events:
            self._take(event)
        return self._root if self._root is not None else Scalar("", plain=True, where="line 1")

    def _take(self, event: yaml.Event) -> None:
        line = event.start_mark.line + 1 if event.start_mark else 0
        where = f"line {line}"
        match event:
            case yaml.DocumentStartEvent():
                self._documents += 1
                if self._documents > 1:
                    raise self._refuse("a second document", "one document", where, "remove the line `---`")
            case yaml.AliasEvent():
                self._place(self._alias(event.anchor, where), where)
            case yaml.ScalarEvent():
                self._refuse_tag(event.tag, where)
                self._count(1, where)
                plain = event.style in (None, "")
                scalar = Scalar(event.value, plain=plain, where=where)
                self._remember(event.anchor, scalar, 1)
                self._place(scalar, where)
            case yaml.CollectionStartEvent():
                self._refuse_tag(event.tag, where)
                if len(self._stack) >= MAX_DEPTH:
                    raise self._refuse("deeper nesting", f"at most {MAX_DEPTH} levels", where, "flatten it")
                node = Table(where=where) if isinstance(event, yaml.MappingStartEvent) else Listing(where=where)
                if self._stack and isinstance(self._stack[-1].node, Table) and self._stack[-1].key is None:
                    raise self._refuse("a collection as a key", "a text as a key", where, "name the setting")
                self._stack.append(_Open(node, event.anchor, self._nodes))
                self._count(1, where)
            case yaml.CollectionEndEvent():
                done = self._stack.pop()
                self._remember(done.anchor, done.node, self._nodes - done.nodes_before)
                self._place(done.node, done.node.where)
            case _:
                pass  # starts and ends of the stream and the document carry nothing

    def _place(self, node: Node, where: str) -> None:
        if not self._stack:
            self._root = node
            return
        top = self._stack[-1]
        if isinstance(top.node, Listing):
            top.node.items.append(node)
        elif top.key is None:
            top.key = self._key(node, top.node, where)
        else:
            top.node.entries[top.key] = node
            top.key = None

    def _key(self, node: Node, table: Table, where: str) -> str:
        if not isinstance(node, Scalar) or len(node.text) > MAX_KEY or not node.text.isprintable():
            raise self._refuse("a key that is no short text", "names of settings", where, "name the setting")
        if node.text == "<<" and node.plain:
            raise self._refuse("a merge key <<", "plain keys", where, "write the settings out")
        if node.text in table.entries:
            raise self._refuse(f"the key {node.text} twice", "each key once", where, "remove one of the two")
        return node.text

    def _alias(self, anchor: str | None, where: str) -> Node:
        self._aliases += 1
        if self._aliases > MAX_ALIASES:
            raise self._refuse("more aliases", f"at most {MAX_ALIASES} aliases", where, "write the values out")
        if anchor is None or anchor not in self._anchors:
            raise self._refuse("an alias without its anchor", "an anchor before its alias", where, "write it out")
        node, nodes = self._anchors[anchor]
        self._count(nodes, where)
        return node

    def _remember(self, anchor: str | None, node: Node, nodes: int) -> None:
        if anchor is not None:
            self._anchors[anchor] = (node, nodes)

    def _count(self, nodes: int, where: str) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise self._refuse(
                "more values", f"at most {MAX_NODES} values, aliases expanded", where, "this is no configuration"
            )

    def _refuse_tag(self, tag: str | None, where: str) -> None:
        if tag is not None:
            raise self._refuse("a tag (!)", "values without tags", where, "quote a text that begins with `!`")

    def _refuse(self, seen: str, allowed: str, where: str, hint: str) -> ConfigError:
        return ConfigError(self._source, seen=f"{seen}, {where}", allowed=allowed, hint=hint)


_REFERENCE: Final = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{")


class Expander:
    """Puts the environment's values in place of ``${VAR}`` and ``${VAR:-default}``; ``$${`` is a literal ``${``.

    ``:-`` takes the default where the variable is unset or empty. A value that came in is not expanded again, and
    because scalars are expanded after parsing it can never become structure. A result that is empty states nothing
    (null), quoted or not; a variable that happens to hold ``null`` is a text. All results of one configuration together
    are at most ``MAX_BYTES`` characters.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._left = MAX_BYTES

    def expand(self, scalar: Scalar, setting: str) -> Scalar:
        """The scalar with its references replaced.

        Raises:
            ConfigError: a variable is not set and has no default, or a ``${`` is malformed.
        """
        if "${" not in scalar.text:
            return scalar
        parts: list[str] = []
        end = 0
        for match in _REFERENCE.finditer(scalar.text):
            parts += (scalar.text[end : match.start()], self._value(match, setting, scalar.where))
            self._left -= len(parts[-1])
            if self._left < 0:
                raise ConfigError(
                    setting, seen="more than 1 MiB after expansion", allowed="at most 1 MiB", hint=scalar.where
                )
            end = match.end()
        parts.append(scalar.text[end:])
        text = "".join(parts)
        return Scalar(text, plain=not text, where=scalar.where)

    def _value(self, match: re.Match[str], setting: str, where: str) -> str:
        name, default = match.groups()
        if match.group() == "$${":
            return "${"
        if name is None:
            raise ConfigError(
                setting,
                seen="a malformed reference after ${",
                allowed="${VAR} or ${VAR:-default}",
                hint=f"write $${{ for a literal ${{ ({where})",
            )
        value = self._environ.get(name)
        if default is not None:
            return value or default
        if value is None:
            raise ConfigError(
                setting,
                seen=f"${{{name}}}, which is not set",
                allowed="a variable of the environment",
                hint=f"set {name} or write ${{{name}:-default}} ({where})",
            )
        return value
