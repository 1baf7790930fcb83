"""SQL identifiers from configuration: validated, then quoted. Values never take this way; they are parameters."""

import re
from typing import Final

from sidecar.errors import ConfigError

_IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}", re.ASCII)
MAX_BYTES: Final = 63  # NAMEDATALEN - 1: PostgreSQL cuts longer names without an error


def is_plain(name: str) -> bool:
    """Whether ``name`` may be quoted as it is."""
    return _IDENTIFIER.fullmatch(name) is not None


def checked(setting: str, name: str) -> str:
    """``name`` itself where it is a plain identifier.

    Raises:
        ConfigError: it is not; ``setting`` says where it stands.
    """
    if not is_plain(name):
        raise ConfigError(setting, seen=name, allowed="a letter or _, then up to 62 letters, digits or _")
    return name


def quoted(*names: str) -> str:
    """``"schema"."table"``; each name was ``checked`` before."""
    return ".".join(f'"{name}"' for name in names)


def suffixed(name: str, suffix: str) -> str:
    """``name`` with ``suffix``, the name cut so that the whole is never cut by PostgreSQL."""
    return name[: MAX_BYTES - len(suffix)] + suffix
