"""spool, dead-letter and store: the command, on whatever ``access`` gives, and the table or lines that it prints.

Answers go to stdout, everything else to stderr, so that exports can be piped. A table shows no payload; ``cat`` and
``export`` do.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from sidecar.config import load
from sidecar.dead_letter import Selection
from sidecar.errors import ConfigError, SidecarUnreachable
from sidecar.operator.access import Access, Document, Running, Stopped
from sidecar.operator.client import Address, Client
from sidecar.operator.progress import Progress
from sidecar.screening.identity import canonical
from sidecar.settings import Secret, Settings

_LONGEST_TOKEN: Final = 4096
_REASON_SHOWN: Final = 60  # characters of a dead letter's reason in the table
_EXIT_NO: Final = 1


def client_of(args: argparse.Namespace, settings: Settings) -> Client:
    """A client of the sidecar that the arguments or the configuration name."""
    return Client(Address.of_listen(args.url or settings.listen.app), _token(args, settings))


def _token(args: argparse.Namespace, settings: Settings) -> Secret | None:
    path = args.token_file or settings.control.token_file
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123  (bounded read)
            text = file.read(_LONGEST_TOKEN).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "--token-file" if args.token_file else "control.token_file",
            seen=path,
            allowed="a file that this user may read",
            hint=getattr(error, "strerror", None) or "it is not text",
        ) from None
    if not text:
        raise ConfigError("--token-file", seen=f"{path} is empty", allowed="a token")
    return Secret(text)


def open_access(args: argparse.Namespace) -> Access:
    """A running sidecar where one listens, else the files; ``--spool`` and ``--url`` leave no choice.

    Raises:
        ConfigError: the configuration cannot be read.
        SidecarUnreachable: nobody listens at ``--url``.
    """
    settings = load(args.config, os.environ).settings
    if args.spool:
        return Stopped(Path(args.spool), settings)
    client = client_of(args, settings)
    if not args.url and not listens(client):
        return Stopped(Path(settings.spool.directory), settings)
    return Running(client)


def listens(client: Client) -> bool:
    """Whether a sidecar answers there."""
    try:
        client.get("/status")
    except SidecarUnreachable:
        return False
    return True


# --- spool -----------------------------------------------------------------------------------------------------------


def spool(args: argparse.Namespace) -> int:
    """Spool ls | cat | verify | export."""
    return _SPOOL[args.verb](args, open_access(args))


def _spool_ls(args: argparse.Namespace, access: Access) -> int:
    accounts = access.accounts()
    if args.json:
        _print_lines(accounts)
        _print_lines(access.frames())
        return 0
    _say(f"{access.where}\n")
    table(
        ("STORE", "PENDING", "DEAD", "OWED", "DELIVERED", "RELEASED", "DISCARDED", "QUARANTINED"),
        ([row["store"], row["pending"], sum(row["dead_letters"].values()), *_account(row)] for row in accounts),
    )
    print()  # noqa: T201  (the answer of a command, as in this whole module)
    table(
        ("SEQ", "ACCEPTED", "PHASE", "RECORDS", "BYTES", "PENDING FOR"),
        (
            [f["seq"], f["accepted_at"], f["phase"], f["records"], f["bytes"], _pending_for(f)]
            if f["sound"]
            else [f["seq"], "damaged header", "", "", "", ""]
            for f in access.frames()
        ),
    )
    return 0


def _account(row: Document) -> list[object]:
    account = row.get("account", {})
    return [account.get(name, "") for name in ("owed", "delivered", "released", "discarded", "quarantined")]


def _pending_for(frame: Document) -> str:
    return "undecided" if frame["undecided"] else ",".join(frame["pending"])


def _spool_cat(args: argparse.Namespace, access: Access) -> int:
    found = _print_lines(access.owed(_id(args.log_id)))
    if not found:
        _say(f"{access.where}: nothing is owed under this log_id (delivered, dead, or never here)\n")
    return 0 if found else _EXIT_NO


def _spool_verify(_args: argparse.Namespace, access: Access) -> int:
    verdict = access.verify()
    print(json.dumps(verdict))  # noqa: T201
    return _EXIT_NO if verdict["problems"] else 0


def _spool_export(_args: argparse.Namespace, access: Access) -> int:
    _print_lines(access.owed(), "exported")
    return 0


# --- dead letters ----------------------------------------------------------------------------------------------------


def dead_letter(args: argparse.Namespace) -> int:
    """Dead-letter ls | redrive | discard | export."""
    return _LETTERS[args.verb](args, open_access(args))


def _letters_ls(args: argparse.Namespace, access: Access) -> int:
    found = access.letters(args.store, args.reason, payload=False)
    if args.json:
        _print_lines(found)
        return 0
    table(
        ("KEY", "STORE", "CLASS", "CODE", "ATTEMPTS", "FIRST", "LAST", "LOG_ID", "WHY"),
        (
            [
                *(d[n] for n in ("key", "store", "class", "code", "attempts", "first_at", "last_at", "log_id")),
                str(d["reason"])[:_REASON_SHOWN],
            ]
            for d in found
        ),
    )
    return 0


def _letters_change(args: argparse.Namespace, access: Access) -> int:
    chosen = Selection(tuple(map(_id, args.id)), args.store, args.reason, args.all)
    chosen.check()
    why = args.why.strip()
    if args.verb == "redrive":
        number, done = access.redrive(chosen, why or "redriven from the command line"), "tried again"
    elif why:
        number, done = access.discard(chosen, why), "discarded"
    else:
        raise ConfigError("--why", seen=args.why, allowed="a reason", hint="say why these records may be given up")
    print(f"{number} dead letters {done}")  # noqa: T201
    return 0 if number or not chosen.log_ids else _EXIT_NO


def _letters_export(args: argparse.Namespace, access: Access) -> int:
    _print_lines(access.letters(args.store, args.reason, payload=True), "exported")
    return 0


# --- stores ----------------------------------------------------------------------------------------------------------


def store(args: argparse.Namespace) -> int:
    """Store pause | resume | rate."""
    if not args.why.strip():
        raise ConfigError("--why", seen=args.why, allowed="a reason", hint="say why; the audit trail keeps it")
    rate = None
    if args.verb == "rate" and args.records_per_second != "none":
        try:
            rate = float(args.records_per_second)
        except ValueError:
            raise ConfigError("rate", seen=args.records_per_second, allowed="a number, or none") from None
    access = open_access(args)
    orders = access.order(args.store, args.verb, args.why, rate)
    print(json.dumps({"store": args.store, "orders": orders}))  # noqa: T201
    if isinstance(access, Stopped):
        _say(f"{access.where}: in force from the next start\n")
    return 0


# --- printing --------------------------------------------------------------------------------------------------------


def _id(text: str) -> str:
    try:
        return canonical(text)
    except ValueError as error:
        raise ConfigError("log_id", seen=text, allowed="a UUID", hint=str(error)) from None


def _say(text: str) -> None:
    sys.stderr.write(text)


def _print_lines(lines: Iterable[Document], what: str = "") -> int:
    """NDJSON; how many lines. ``what``: with progress on a terminal."""
    progress = Progress(what, quiet=True) if what and not sys.stdout.isatty() else None
    number = 0
    for number, line in enumerate(lines, 1):
        sys.stdout.write(json.dumps(line) + "\n")
        if progress is not None:
            progress.show(number, None)
    if progress is not None:
        progress.close()
    sys.stdout.flush()
    return number


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns as wide as the first rows need; a later, wider value only shifts its own line."""
    shown: Iterator[list[str]] = ([printable(str(v)) if v is not None else "" for v in row] for row in rows)
    first = [list(head), *(row for _, row in zip(range(100), shown, strict=False))]
    widths = [max(len(row[i]) for row in first) for i in range(len(head))]
    for row in first:
        print("  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip())  # noqa: T201
    for row in shown:
        print("  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip())  # noqa: T201


def printable(text: str) -> str:
    """Control characters spelt out: a client's field names stand in tables, and a terminal obeys what it is shown."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


_Command = Callable[[argparse.Namespace, Access], int]
_SPOOL: Final[Mapping[str, _Command]] = {
    "ls": _spool_ls,
    "cat": _spool_cat,
    "verify": _spool_verify,
    "export": _spool_export,
}
_LETTERS: Final[Mapping[str, _Command]] = {
    "ls": _letters_ls,
    "redrive": _letters_change,
    "discard": _letters_change,
    "export": _letters_export,
}
