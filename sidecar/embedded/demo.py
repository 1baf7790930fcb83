"""``sidecar demo``: a migration in two minutes, with everything that goes wrong in one, and a proof at the end.

A private PostgreSQL, a local DynamoDB behind a switch that throttles, and a real ``sidecar serve`` as a child process
on a mounted configuration that is changed as kubelet changes a ConfigMap. An application logs without pause all the
while, and remembers each acknowledged record and the phase that acknowledged it. At the end both stores are read in
full: what was acknowledged must be there, once, nothing else, and equal in both. ``--fast`` walks the same way without
pauses for reading. Everything lies in a temporary directory and ends with the demo, Ctrl-C included.

Exit code: 0 when the proof holds, 1 when it does not or a part did not do its own (the directory is kept then).
"""

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import aiohttp

from sidecar.clock import SystemClock
from sidecar.embedded.postgres import EmbeddedError
from sidecar.embedded.stand import CREDENTIALS, Stand, running
from sidecar.embedded.traffic import Traffic
from sidecar.phase import DYNAMODB, POSTGRES, Phase, StoreName
from sidecar.stores.postgres_connections import Connections

_EVERYTHING: Final = (-62_135_596_800_000_000, 253_402_300_799_999_999)  # years 1 to 9999
_PATIENCE: Final = 30.0  # seconds that one expectation of the script may take
_POLL: Final = 0.05
_HELD_AFTER: Final = 2.0  # seconds that a phase change may be held by its gates before the demo gives a reason
_FAILED: Final = 1
_SOME: Final = 100  # records
_BACKLOG: Final = 50  # records; fewer are simply under way
_PARTS: Final = ("delivered", "pending", "dead_lettered", "released", "discarded", "quarantined")
_POISON: Final = "PoisonService"
_READ: Final = 7.0  # seconds to read what was said
_WATCH: Final = 9.0  # seconds to watch a fault at work


def say(text: str = "") -> None:
    """One line for the person at the terminal."""
    print(text, flush=True)  # noqa: T201  (the command line speaks by printing)


class _Broken(Exception):
    """What the script expected did not happen in time."""


async def run(*, fast: bool) -> int:
    """Walk; the exit code. Ctrl-C stops every part."""
    directory = _directory()
    os.environ.update({name: value for name, value in CREDENTIALS.items() if name not in os.environ})
    keep = False
    try:
        say(f"starting PostgreSQL, a local DynamoDB and the sidecar in {directory} ...")
        async with running(directory) as stand:
            keep = not await _Walk(stand, fast=fast).go()
    except (_Broken, EmbeddedError) as error:
        keep = True
        say(f"\nFAILED: {error}")
    finally:
        if keep:
            say(f"logs and files are kept in {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    return _FAILED if keep else 0


def _directory() -> Path:
    made = Path(tempfile.mkdtemp(prefix="sidecar-demo-"))
    made.chmod(0o755)  # as root PostgreSQL runs as nobody
    return made


class _Walk:
    """The script."""

    def __init__(self, stand: Stand, *, fast: bool) -> None:
        self._stand = stand
        self._fast = fast
        self._start = time.monotonic()
        self._traffic = Traffic(stand.app, stand.client)
        self._step = 0

    async def go(self) -> bool:
        """Whether the proof holds."""
        await self._until("the sidecar is ready", self._answers)
        traffic = asyncio.create_task(self._traffic.run())
        try:
            for step in (
                self._phase_0,
                self._phase_1,
                self._throttled,
                self._phase_2,
                self._outage,
                self._poison,
                self._phase_3,
            ):
                await step()
                if traffic.done():
                    traffic.result()
            self._traffic.stop()  # and not cancel: an answer that is not read leaves open what was acknowledged
            await traffic
        finally:
            traffic.cancel()
            await asyncio.gather(traffic, return_exceptions=True)
        return await self._proof()

    # --- the way -------------------------------------------------------------------------------------------------

    async def _phase_0(self) -> None:
        self._title("Phase 0, sql_only: an application logs about 200 records a second; PostgreSQL alone has them")
        await self._flows()

    async def _phase_1(self) -> None:
        await self._enter(Phase.DUAL_WRITE, "both stores are written; PostgreSQL is required, DynamoDB may lag")

    async def _throttled(self) -> None:
        self._title("DynamoDB throttles at 60 items a second: the writer slows down by itself, nobody is pushed back")
        self._stand.switch.items_per_second = 60

        async def slowed() -> bool:
            store = await self._store(DYNAMODB)
            return bool(store["state"] == "throttled" and store["account"]["pending"] > _BACKLOG)

        await self._until("DynamoDB is throttled and has a backlog", slowed)
        await self._show(_WATCH)
        self._say(f"the switch refused {self._stand.switch.refused} calls; it is taken away")
        self._stand.switch.items_per_second = None
        await self._drained(DYNAMODB)

    async def _phase_2(self) -> None:
        await self._enter(Phase.DUAL_WRITE_READ_DYNAMO, "both stores are required; reads come from DynamoDB")

    async def _outage(self) -> None:
        self._title("PostgreSQL is killed (kill -9). Records are still acknowledged: they wait on the sidecar's disk")
        before = len(self._traffic.acked)
        self._stand.postgres.kill()

        async def waits() -> bool:
            store = await self._store(POSTGRES)
            return bool(store["state"] == "down") and len(self._traffic.acked) >= before + _SOME

        await self._until("PostgreSQL is down and records are accepted all the same", waits)
        await self._show(_WATCH)
        self._say("PostgreSQL comes back")
        await self._stand.postgres.start()
        await self._drained(POSTGRES)

    async def _poison(self) -> None:
        self._title(
            "A CHECK in PostgreSQL, and a record that breaks it: it alone is a dead letter, for PostgreSQL only"
        )
        check = f"CONSTRAINT demo CHECK (service_name <> '{_POISON}') NOT VALID"
        await self._sql(f"ALTER TABLE integration_logs ADD {check}")
        log_id = await self._traffic.post_one({"service_name": _POISON, "request_data": {"note": "poison"}})

        async def dead() -> bool:
            return bool((await self._store(POSTGRES))["account"]["dead_lettered"])

        await self._until("one dead letter", dead)
        await self._command("dead-letter", "ls")
        await self._pause(_READ)
        self._say("the CHECK is mended, and the record tried again:")
        await self._sql("ALTER TABLE integration_logs DROP CONSTRAINT demo")
        await self._command("dead-letter", "redrive", "--id", log_id)
        await self._drained(POSTGRES)

    async def _phase_3(self) -> None:
        await self._enter(Phase.DYNAMO_ONLY, "DynamoDB alone; what PostgreSQL was owed before it still gets")

    async def _proof(self) -> bool:
        self._title("The application stops. Is anything lost?")
        await self._command("wait", "--timeout", "30")
        traffic = self._traffic
        wrong = sum(traffic.other.values())
        say()
        say(f"  acknowledged records        {len(traffic.acked):>8}")
        say(f"  answers other than 202      {wrong:>8}   (503, sent again: {traffic.pushed_back})")
        held: dict[StoreName, dict[str, bytes]] = {}
        good = not wrong
        for name, store in self._stand.stores.items():
            held[name] = {entry.log_id: entry.digest async for entry in store.scan(*_EVERYTHING)}
            owed = traffic.owed_to(name)
            missing, surplus = len(owed - held[name].keys()), len(held[name].keys() - owed)
            found = f"has {len(held[name])}, missing {missing}, not owed {surplus}"
            say(f"  {name + ' is owed':<27} {len(owed):>8}   {found}")
            good = good and not missing and not surplus
        both = held[POSTGRES].keys() & held[DYNAMODB].keys()
        differing = sum(held[POSTGRES][i] != held[DYNAMODB][i] for i in both)
        say(f"  in both stores              {len(both):>8}   differing in any of 13 fields: {differing}")
        for label, account in (await self._accounts()).items():
            total = sum(account[part] for part in _PARTS)
            say(f"  {label + ' account':<27} {account['owed']:>8} = " + " + ".join(f"{account[p]} {p}" for p in _PARTS))
            good = good and total == account["owed"] == account["delivered"]
        good = good and not differing
        say()
        proved = "PROVED: every acknowledged record is where it is owed, once, and nothing else is."
        say(proved if good else "NOT PROVED")
        return good

    async def _accounts(self) -> dict[str, dict[str, int]]:
        return {name: store["account"] for name, store in (await self._stand.status())["stores"].items()}

    # --- how -----------------------------------------------------------------------------------------------------

    def _title(self, text: str) -> None:
        self._step += 1
        say()
        self._say(f"{self._step}. {text}")

    def _say(self, text: str) -> None:
        seconds = int(time.monotonic() - self._start)
        say(f"[{seconds // 60}:{seconds % 60:02}] {text.rstrip()}")

    async def _pause(self, seconds: float) -> None:
        if not self._fast:
            await asyncio.sleep(seconds)

    async def _enter(self, phase: Phase, meaning: str) -> None:
        """Edit the mounted file; where gates hold the step, show them and give the reason that overrides them."""
        self._title(f"Phase {phase.value}, {phase.label}: the mounted file is edited; {meaning}")
        self._stand.mount(phase=phase.label, phase_force=None)
        asked = time.monotonic()
        forced = False

        async def applied() -> bool:
            nonlocal forced
            found = (await self._stand.status())["phase"]
            held = found["applied"] != phase.label and found["hold"]
            if held and not forced and time.monotonic() - asked > _HELD_AFTER:
                forced = True
                self._say(f"held: {held}; phase_force overrides it, with a reason that is recorded")
                self._stand.mount(phase_force="demo: there is no history to copy, and no time to soak")
            return bool(found["applied"] == phase.label)

        await self._until(f"{phase.label} is applied", applied)
        self._say(f"applied {time.monotonic() - asked:.1f} s after the edit")
        await self._flows()

    async def _flows(self) -> None:
        """Some records of this phase."""
        before = len(self._traffic.acked)

        async def more() -> bool:
            return len(self._traffic.acked) >= before + _SOME

        await self._until("records are acknowledged", more)
        await self._show(_READ)

    async def _show(self, seconds: float) -> None:
        await self._pause(seconds)
        stores = (await self._stand.status())["stores"]
        states = "   ".join(
            f"{name}: {s['state']}, {s['account']['delivered']} delivered, {s['account']['pending']} pending"
            for name, s in stores.items()
        )
        self._say(f"acknowledged {len(self._traffic.acked)}   {states}")

    async def _drained(self, name: StoreName) -> None:
        started = time.monotonic()

        async def nearly() -> bool:
            return bool((await self._store(name))["account"]["pending"] < _BACKLOG)

        await self._until(f"{name} has caught up", nearly)
        self._say(f"{name} has caught up after {time.monotonic() - started:.1f} s")
        await self._pause(_READ / 2)

    async def _store(self, name: StoreName) -> dict[str, Any]:
        found: dict[str, Any] = (await self._stand.status())["stores"][name]
        return found

    async def _answers(self) -> bool:
        try:
            await self._stand.status()
        except aiohttp.ClientError:
            return False
        return True

    async def _until(self, what: str, check: Callable[[], Awaitable[bool]]) -> None:
        end = time.monotonic() + _PATIENCE
        while not await check():
            process = self._stand.process
            if process is not None and process.poll() is not None:
                raise _Broken(f"the sidecar exited with {process.returncode} while waiting: {what}")
            if time.monotonic() > end:
                raise _Broken(f"not within {_PATIENCE:g} s: {what}")
            await asyncio.sleep(_POLL)

    async def _command(self, *arguments: str) -> None:
        """Run a command of ours and show what it says."""
        self._say(f"$ sidecar {' '.join(arguments)}")
        done = await asyncio.to_thread(self._stand.command, *arguments)
        for line in (done.stdout + done.stderr).splitlines():
            say(f"       {line}")
        if done.returncode:
            raise _Broken(f"sidecar {arguments[0]} exited with {done.returncode}")

    async def _sql(self, statement: str) -> None:
        admin = Connections(self._stand.postgres.settings(), relation="integration_logs", size=1, clock=SystemClock())
        try:
            await admin.run(lambda link: link.connection.execute(statement))
        finally:
            await admin.close()
