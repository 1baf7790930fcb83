"""The strongest peer, where its program can be had: Fluent Bit (C), HTTP in, filesystem buffer, PostgreSQL out.

It promises less: it answers before a record is durable, stores without a key, and writes one store. So it is measured
beside two sidecars, one that writes PostgreSQL alone as it does, and one that writes both stores.

Its program is no part of this project: it is looked for on the PATH, or named by ``--peer`` or ``FLUENT_BIT``. It needs
the plugins ``in_http`` and ``out_pgsql`` (``docs`` of Fluent Bit: pgsql).

Settings, tuned for it: one thread for the output (else libpq holds up the input's loop), records flushed every 0.2 s
instead of 1 s, chunks kept in memory as well as on disk, ``data`` as the plugin makes it (a row of tag, time and jsonb
without an index: fewer indexes than ours).
"""

import os
import shutil
from pathlib import Path
from typing import Final

NAME: Final = "fluent-bit"
DATABASE: Final = "peer"

_CONFIGURATION: Final = """\
[SERVICE]
    flush 0.2
    daemon off
    log_level warn
    storage.path {storage}
    storage.max_chunks_up 512
[INPUT]
    name http
    listen 127.0.0.1
    port {port}
    storage.type filesystem
    buffer_max_size 8M
[OUTPUT]
    name pgsql
    match *
    host 127.0.0.1
    port {postgres}
    user postgres
    database {database}
    table {table}
    timestamp_key date
    async false
    workers 1
    storage.total_limit_size 4G
    retry_limit no_limits
"""


def program(given: str | None) -> str | None:
    """Where its program is: as given, by ``FLUENT_BIT``, on the PATH; None where it cannot be had.

    Raises SystemExit where one was named that is not there.
    """
    named = given or os.environ.get("FLUENT_BIT")
    found = shutil.which(named or NAME)
    if named and found is None:
        raise SystemExit(f"--peer, FLUENT_BIT: {named}: no such program; leave both out to do without the peer")
    return found


def configuration(directory: Path, *, port: int, postgres: int, table: str) -> Path:
    """Write its configuration, with an empty buffer; returns the file."""
    storage = directory / "peer-storage"
    shutil.rmtree(storage, ignore_errors=True)
    storage.mkdir(parents=True)
    file = directory / "peer.conf"
    file.write_text(
        _CONFIGURATION.format(storage=storage, port=port, postgres=postgres, database=DATABASE, table=table)
    )
    return file


def table(name: str) -> str:
    """The statement that makes its table where it is missing, as the plugin itself does a moment after its start."""
    return f"CREATE TABLE IF NOT EXISTS {name} (tag varchar, time timestamp, data jsonb)"
