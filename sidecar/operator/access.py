"""The one thing that the commands act on: a running sidecar through its control API, or a stopped one's files.

Both give the same documents (``sidecar.spool.documents``). Reading a stopped spool changes no byte of it; redrive,
discard and orders open it as a sidecar would, recovering what an unclean stop left, and close it in order.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from sidecar.clock import SystemClock
from sidecar.dead_letter import DeadLetters, Selection, check_names
from sidecar.errors import SpoolRefused
from sidecar.operator.client import Client, actor
from sidecar.phase import STORES
from sidecar.settings import Settings
from sidecar.spool import Spool, disk, documents
from sidecar.spool.inspect import Held, StoppedSpool
from sidecar.spool.view import OPEN
from sidecar.steering import Orders, Steering
from sidecar.steering import document as orders_document

Document = Mapping[str, Any]
_PAGE = 500
_T = TypeVar("_T")


class Access(Protocol):
    """What a command may do. Every method may raise SidecarError."""

    where: str

    def accounts(self) -> list[Document]:
        """Per store: what it is owed, what is pending, dead and so on."""
        ...

    def frames(self) -> Iterator[Document]:
        """Frames that somebody is still owed."""
        ...

    def owed(self, log_id: str | None = None) -> Iterator[Document]:
        """Records that somebody is still owed, with payload; or that one."""
        ...

    def verify(self) -> Document:
        """Every checksum; ``problems`` is empty where all is sound."""
        ...

    def letters(self, store: str | None, reason: str | None, *, payload: bool) -> Iterator[Document]:
        """Dead letters, oldest first."""
        ...

    def redrive(self, chosen: Selection, why: str) -> int:
        """How many are tried again."""
        ...

    def discard(self, chosen: Selection, why: str) -> int:
        """How many were given up."""
        ...

    def order(self, store: str, verb: str, why: str, rate: float | None = None) -> Document:
        """pause, resume or rate; what is in force now."""
        ...


class Running:
    """Through the control API."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.where = f"the running sidecar at {client.address}"

    def accounts(self) -> list[Document]:
        """See Access."""
        page = self._client.get("/api/control/spool", limit=1)
        dead: dict[str, dict[str, int]] = {}
        for entry in page["dead_letters"]:
            dead.setdefault(entry["store"], {})[entry["reason"]] = entry["records"]
        rows: list[Document] = [
            {"store": store, "pending": account["pending"], "dead_letters": dead.pop(store, {}), "account": account}
            for store, account in page["stores"].items()
        ]
        return rows + [{"store": s, "pending": 0, "dead_letters": kinds} for s, kinds in dead.items()]

    def frames(self) -> Iterator[Document]:
        """See Access."""
        after: int | None = 0
        while after is not None:
            page = self._client.get("/api/control/spool", after=after, limit=_PAGE)
            yield from page["frames"]
            after = page["next_after"]

    def owed(self, log_id: str | None = None) -> Iterator[Document]:
        """See Access."""
        return self._client.lines("/api/control/spool/export", log_id=log_id)

    def verify(self) -> Document:
        """See Access."""
        return self._client.get("/api/control/spool/verify")

    def letters(self, store: str | None, reason: str | None, *, payload: bool) -> Iterator[Document]:
        """See Access."""
        if payload:
            yield from self._client.lines("/api/control/dead-letters/export", store=store, reason=reason)
            return
        after: int | None = 0
        while after is not None:
            page = self._client.get("/api/control/dead-letters", store=store, reason=reason, after=after, limit=_PAGE)
            yield from page["dead_letters"]
            after = page["next_after"]

    def redrive(self, chosen: Selection, why: str) -> int:
        """See Access."""
        return self._change("redrive", chosen, why)

    def discard(self, chosen: Selection, why: str) -> int:
        """See Access."""
        return self._change("discard", chosen, why)

    def _change(self, verb: str, chosen: Selection, why: str) -> int:
        select: dict[str, object] = {"all": chosen.everything}
        if chosen.log_ids:
            select["log_ids"] = chosen.log_ids
        if chosen.store:
            select["store"] = chosen.store
        if chosen.retry_class:
            select["reason"] = chosen.retry_class
        answer = self._client.post(f"/api/control/dead-letters/{verb}", {"reason": why, "select": select})
        return int(answer["records"])

    def order(self, store: str, verb: str, why: str, rate: float | None = None) -> Document:
        """See Access."""
        body: dict[str, object] = {"reason": why}
        if verb == "rate":
            body["records_per_second"] = rate
        found: Document = self._client.post(f"/api/control/stores/{store}/{verb}", body)["orders"]
        return found


class Stopped:
    """On the files of a directory that no sidecar holds."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        """``settings`` give the bounds that opening for a change needs."""
        self._directory = directory
        self._settings = msgspec.structs.replace(
            settings, spool=msgspec.structs.replace(settings.spool, directory=str(directory))
        )
        self.where = f"the files in {directory}"

    def accounts(self) -> list[Document]:
        """See Access."""
        with StoppedSpool(self._directory) as spool:
            pending = {row.name: 0 for row in spool.progress}
            dead: dict[str, dict[str, int]] = {}
            for line in spool.frames():
                for name in line.owed - line.settled:
                    pending[name] += line.records
            for letter in spool.letters(deferred=True):
                pending[letter.store] = pending.get(letter.store, 0) + 1
            for letter in spool.letters():
                kinds = dead.setdefault(letter.store, {})
                kinds[letter.retry_class] = kinds.get(letter.retry_class, 0) + 1
            rows: list[Document] = []
            for row in spool.progress:
                kinds = dead.pop(row.name, {})
                account = {
                    "delivered": row.delivered,
                    "released": row.released,
                    "discarded": row.discarded,
                    "quarantined": row.quarantined,
                }
                # By the identity: the file's own number is behind where a kill came before it was written again.
                account["owed"] = sum(account.values()) + pending[row.name] + sum(kinds.values())
                rows.append(
                    {"store": row.name, "pending": pending[row.name], "dead_letters": kinds, "account": account}
                )
            return rows + [{"store": s, "pending": 0, "dead_letters": kinds} for s, kinds in dead.items()]

    def frames(self) -> Iterator[Document]:
        """See Access."""
        with StoppedSpool(self._directory) as spool:
            for line in spool.frames():
                if line.owed - line.settled or line.unresolved or not line.sound:
                    yield documents.frame(line)

    def owed(self, log_id: str | None = None) -> Iterator[Document]:
        """See Access."""
        with StoppedSpool(self._directory) as spool:
            seen: set[tuple[str, str]] = set()
            for item in spool.records(log_id=log_id):
                deferred = [name for name, fate in item.stores.items() if fate == "deferred"]
                seen.update((name, item.record.log_id) for name in deferred)
                if not item.stores or OPEN.intersection(item.stores.values()):
                    yield documents.held(item)
            for letter in spool.letters(deferred=True):
                if letter.record is None or (letter.store, letter.record.log_id) in seen:
                    continue
                if log_id in (None, letter.log_id):
                    yield documents.held(
                        Held(letter.record, 0, letter.first_us, letter.phase, {letter.store: "deferred"})
                    )

    def verify(self) -> Document:
        """See Access."""
        with StoppedSpool(self._directory) as spool:
            return asdict(spool.verify())

    def letters(self, store: str | None, reason: str | None, *, payload: bool) -> Iterator[Document]:
        """See Access."""
        check_names(store, reason)
        with StoppedSpool(self._directory) as spool:
            for letter in spool.letters():
                if store in (None, letter.store) and reason in (None, letter.retry_class):
                    yield documents.letter(letter, payload=payload)

    def redrive(self, chosen: Selection, why: str) -> int:
        """See Access."""
        return self._opened(lambda spool: _letters(spool).redrive(chosen, who=_who(), reason=why))

    def discard(self, chosen: Selection, why: str) -> int:
        """See Access."""
        return self._opened(lambda spool: _letters(spool).discard(chosen, who=_who(), reason=why))

    def order(self, store: str, verb: str, why: str, rate: float | None = None) -> Document:
        """See Access."""

        async def give(spool: Spool) -> Orders:
            steering = Steering(spool, STORES, {}, SystemClock())
            if verb == "rate":
                return await steering.rate(store, rate, by=_who(), reason=why)
            act = {"pause": steering.pause, "resume": steering.resume}[verb]
            return await act(store, by=_who(), reason=why)

        return orders_document(self._opened(give))

    def _opened(self, act: Callable[[Spool], Awaitable[_T]]) -> _T:
        """Open as a sidecar would, act, close in order. Raises SpoolLocked where one runs."""

        async def run() -> _T:
            clock = SystemClock()
            options = self._settings.spool
            spool = Spool.open(self._directory, options, self._settings.dedup, STORES, clock)
            try:
                return await act(spool)
            finally:
                await spool.close()

        require_spool(self._directory)
        return asyncio.run(run())


def require_spool(directory: Path) -> None:
    """Raises SpoolRefused where there is none: opening would make an empty one out of a typing error."""
    with contextlib.suppress(OSError):
        if (directory / disk.DATABASE).stat().st_size:
            return
    raise SpoolRefused(f"spool directory: there is no {disk.DATABASE} in {directory}; check the path")


def _letters(spool: Spool) -> DeadLetters:
    return DeadLetters(spool, max_bytes=0, clock=SystemClock())


def _who() -> str:
    return f"command line {actor()}"
