"""The spool against a small model, with crashes at any committed moment.

The model knows, per record and store, whether it is pending, deferred, dead, discarded, released or delivered. After
every step the identity holds and the counters equal the model's. A crash is a copy of the files at a moment when
nothing is under way; settlements that were not written down yet may be forgotten, which the model allows: such
records are pending again. So the model remembers the last state that was surely on disk.

What is on the disk without a flush may be lost in a crash: ``position`` may be as it was at any earlier moment since
the start, and the log may end in the torn beginning of a commit that nobody was told of.
"""

import asyncio
import copy
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sidecar.spool import wal
from tests.spool.harness import (
    BOTH,
    DUAL,
    DYNAMO,
    FENCED,
    SQL_ONLY,
    STORES,
    balanced,
    crash_copy,
    dead,
    flushed,
    later,
    open_spool,
    pending_in_frames,
    put,
    records,
)
from tests.spool.harness import settings as spool_settings

FRAME = 24 + 4096  # bytes of one frame of SQLite's log: its header and a page
COUNTED = {
    "pending": ("pending", "deferred"),
    "delivered": ("delivered",),
    "dead_lettered": ("dead",),
    "released": ("released",),
    "discarded": ("discarded",),
}


class Model:
    """What must be true."""

    def __init__(self) -> None:
        self.fate: dict[tuple[str, str], str] = {}  # (log_id, store): what became of it
        self.weak: set[tuple[str, str]] = set()  # best-effort obligations
        self.unresolved: set[str] = set()

    def accept(self, ids, obligation) -> None:
        if obligation.unresolved:
            self.unresolved |= set(ids)
            return
        for log_id in ids:
            for store in obligation.owed:
                self.fate[log_id, store] = "pending"
                if store in obligation.best_effort:
                    self.weak.add((log_id, store))

    def resolve(self, obligation) -> None:
        ids, self.unresolved = self.unresolved, set()
        self.accept(ids, obligation)

    def count(self, store, fates) -> int:
        return sum(1 for (_, s), fate in self.fate.items() if s == store and fate in fates)

    def missing(self, present, absent) -> int:
        return sum(
            1
            for (log_id, store), fate in self.fate.items()
            if store == present and fate == "delivered" and self.fate.get((log_id, absent), "delivered") != "delivered"
        )


class SpoolMachine(RuleBasedStateMachine):
    """The rules."""

    @initialize(cache=st.sampled_from([0, 2_000, 1 << 20]))
    def start(self, cache) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="spool-model-"))
        self.loop = asyncio.new_event_loop()
        self.lives = 0
        self.settings = spool_settings(tail_cache_bytes=cache)
        self.model = Model()
        self.durable = copy.deepcopy(self.model)  # with every settlement that is surely in the file
        self.taken = {store: [] for store in STORES}
        self.directory = self.root / "0"
        self.spool = None
        self.open()

    def run(self, coroutine):
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 20))

    def open(self) -> None:
        self.positions = []

        async def opening():
            return open_spool(self.directory, settings=self.settings)

        self.spool = self.run(opening())
        self.taken = {store: [] for store in STORES}
        assert self.spool.recovery.messages == ()

    def teardown(self) -> None:
        if getattr(self, "spool", None) is not None:
            self.run(self.spool.close())
            self.loop.close()
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    def saved(self) -> None:
        """All settlements are in the file."""
        self.run(flushed(self.spool))
        self.durable = copy.deepcopy(self.model)

    # --- rules -----------------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 6), obligation=st.sampled_from([SQL_ONLY, DUAL, BOTH, DYNAMO, FENCED]))
    def accept(self, count, obligation) -> None:
        batch = records(count, size=50)
        self.run(put(self.spool, batch, obligation))
        for model in (self.model, self.durable):
            model.accept([r.log_id for r in batch], obligation)
        self.positions.append((self.directory / "position").read_bytes())

    @rule(store=st.sampled_from(STORES), most=st.integers(1, 8))
    def take(self, store, most) -> None:
        in_hand = sum(len(f.records) for f in self.taken[store])
        if pending_in_frames(self.spool, store) > in_hand:
            frames = self.run(self.spool.cursor(store).take(most, 1 << 20))
            assert frames
            for frame in frames:
                for record in frame.records:
                    assert self.model.fate[record.log_id, store] == "pending", "handed out twice, or to the wrong store"
                    assert frame.required == ((record.log_id, store) not in self.model.weak)
            self.taken[store] += frames

    @precondition(lambda self: any(self.taken.values()))
    @rule(data=st.data())
    def settle(self, data) -> None:
        store = data.draw(st.sampled_from([s for s in STORES if self.taken[s]]))
        frame = self.taken[store].pop(data.draw(st.integers(0, len(self.taken[store]) - 1)))
        kinds = data.draw(st.lists(st.sampled_from(["delivered"] * 3 + ["dead", "deferred"]), min_size=6, max_size=6))
        leftovers = []
        for i, (record, fate) in enumerate(zip(frame.records, kinds, strict=False)):
            self.model.fate[record.log_id, store] = fate
            if fate != "delivered":
                leftovers.append(dead(i) if fate == "dead" else later(i))

        async def settle() -> None:
            self.spool.cursor(store).settle(frame, leftovers)

        self.run(settle())

    @rule()
    def wait_for_the_marks(self) -> None:
        self.saved()

    @rule(store=st.sampled_from(STORES), outcome=st.sampled_from(["delivered", "dead", "deferred"]))
    def try_deferred_again(self, store, outcome) -> None:
        items = self.run(self.spool.due(store, 1 << 60, 2))
        for item in items:
            assert self.model.fate[item.record.log_id, store] == "deferred"
            leftover = {"delivered": None, "dead": dead(0), "deferred": later(0)}[outcome]
            self.run(self.spool.finish_deferred(item, leftover))
            self.model.fate[item.record.log_id, store] = outcome
        self.saved()

    @rule(store=st.sampled_from(STORES), some=st.integers(1, 3))
    def redrive(self, store, some) -> None:
        letters = self.run(self.spool.dead_letters(store=store, limit=some))
        assert self.run(self.spool.redrive([d.key for d in letters])) == len(letters)
        for letter in letters:
            self.model.fate[letter.log_id, store] = "deferred"
        self.saved()

    @rule(store=st.sampled_from(STORES))
    def discard(self, store) -> None:
        letters = self.run(self.spool.dead_letters(store=store, limit=2))
        done = self.run(self.spool.discard([d.key for d in letters], who="model", reason="test"))
        assert done == len(letters)
        for letter in letters:
            self.model.fate[letter.log_id, store] = "discarded"
        self.saved()

    @rule(obligation=st.sampled_from([SQL_ONLY, DUAL, BOTH, DYNAMO]))
    def resolve(self, obligation) -> None:
        assert self.run(self.spool.resolve(obligation)) == len(self.model.unresolved)
        self.model.resolve(obligation)
        self.saved()

    @rule(store=st.sampled_from(STORES))
    def strengthen(self, store) -> None:
        self.run(self.spool.strengthen(store))
        self.model.weak = {(i, s) for i, s in self.model.weak if s != store}
        self.durable.weak = {(i, s) for i, s in self.durable.weak if s != store}

    @rule(data=st.data())
    def release(self, data) -> None:
        plan = self.run(self.spool.release_candidates("dynamodb", data.draw(st.integers(1, 2_000))))
        if plan is None:
            return
        before = {k for k, fate in self.model.fate.items() if fate == "pending" and k in self.model.weak}
        assert self.run(self.spool.release(plan)) == plan.records == sum(plan.hours.values())
        released = {r for r in before if self.run(self.spool.status(r[0])).stores["dynamodb"] == "released"}
        assert len(released) == plan.records
        for log_id, store in released:
            assert self.model.fate[log_id, "postgres"] == "delivered", "released what a required store has not"
            self.model.fate[log_id, store] = "released"
        self.saved()

    @rule()
    def stop_and_start(self) -> None:
        self.run(self.spool.close())
        self.durable = copy.deepcopy(self.model)
        self.open()
        assert not self.spool.recovery.unclean

    @precondition(lambda self: any(self.taken.values()))
    @rule(data=st.data())
    def lose_the_answers(self, data) -> None:
        """A store may have it or not, nobody knows: all that it held is handed out again."""
        store = data.draw(st.sampled_from([s for s in STORES if self.taken[s]]))

        async def take_back() -> None:
            self.spool.take_back(store)

        self.run(take_back())
        self.taken[store] = []

    @rule(data=st.data(), tail=st.sampled_from(["kept", "torn frame", "torn commit", "noise"]), older=st.booleans())
    def crash(self, data, tail, older) -> None:
        """Settlements since the last sure moment may or may not be in the file; nothing else may differ."""
        self.lives += 1
        copied = crash_copy(self.directory, self.root / str(self.lives))
        if older and self.positions:
            (copied / "position").write_bytes(data.draw(st.sampled_from(self.positions)))
        self.tear(copied / "spool.db-wal", tail)
        self.run(self.spool.close())
        shutil.rmtree(self.directory)
        self.directory = copied
        self.open()
        assert self.spool.recovery.unclean
        for (log_id, store), fate in self.model.fate.items():
            if fate != self.durable.fate[log_id, store]:
                now = self.run(self.spool.status(log_id))
                kept = now is None or now.stores[store] != "pending"
                if not kept:
                    self.model.fate[log_id, store] = self.durable.fate[log_id, store]
        self.saved()

    def tear(self, log: Path, tail: str) -> None:
        """Put behind the last commit what a write that was cut off leaves there."""
        content = log.read_bytes()
        frames = wal.walk(content).frames
        if tail == "kept" or not frames:
            return
        end = frames[-1].at + 4096
        torn = {"torn frame": content[end - FRAME : end - 1], "torn commit": content[end - FRAME : end], "noise": b"x"}
        log.write_bytes(content[:end] + torn[tail] + content[end + len(torn[tail]) :])

    # --- what always holds -----------------------------------------------------------------------------------------

    @invariant()
    def the_identity_holds_and_the_counters_are_the_models(self) -> None:
        for store in STORES:
            counters = self.spool.counters(store)
            assert balanced(counters), counters
            for name, fates in COUNTED.items():
                assert getattr(counters, name) == self.model.count(store, fates), (store, name)
            assert counters.quarantined == 0
            assert (counters.oldest_pending_us is None) == (counters.pending == 0)

    @rule()
    def the_divergence_is_the_models(self) -> None:
        self.saved()
        assert self.spool.divergence() == {
            (a, b): self.model.missing(a, b) for a, b in ((STORES[0], STORES[1]), (STORES[1], STORES[0]))
        }

    @rule(data=st.data())
    def status_is_the_models(self, data) -> None:
        ids = sorted({log_id for log_id, _ in self.model.fate})
        if not ids:
            return
        log_id = data.draw(st.sampled_from(ids))
        status = self.run(self.spool.status(log_id))
        expected = {s: self.model.fate[log_id, s] for s in STORES if (log_id, s) in self.model.fate}
        words = {"dead": "dead_lettered"}
        if status is not None:
            assert status.stores == {s: words.get(fate, fate) for s, fate in expected.items()}
        else:
            assert set(expected.values()) <= {"delivered", "released"}, "still of interest, and forgotten"


TestSpoolModel = pytest.mark.timeout(7200)(SpoolMachine.TestCase)  # busy machines are slow, not wrong
TestSpoolModel.settings = settings(
    max_examples=int(os.environ.get("SPOOL_MODEL", "20")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
