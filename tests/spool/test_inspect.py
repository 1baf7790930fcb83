"""Looking into a stopped spool changes nothing and shows what is there, killed or stopped in order."""

import asyncio

import pytest

from sidecar.errors import SpoolLocked, SpoolRefused
from sidecar.spool import disk
from sidecar.spool.inspect import StoppedSpool
from tests.spool.harness import (
    BOTH,
    FENCED,
    SQL_ONLY,
    changed,
    crash_copy,
    dead,
    flushed,
    later,
    open_spool,
    put,
    records,
    spool_at,
    take,
)

FIRST, SECOND, THIRD = records(4, size=300), records(2, size=9_000), records(3)


async def _fill(directory, copy):
    spool = open_spool(directory)
    await put(spool, FIRST, BOTH)
    await put(spool, SECOND, SQL_ONLY)
    await put(spool, THIRD, FENCED)
    (frame,) = await take(spool, "dynamodb")
    spool.cursor("dynamodb").settle(frame, [dead(0), later(1)])
    await flushed(spool)
    crash_copy(directory, copy)
    await spool.close()


@pytest.fixture(params=["killed", "stopped"])
def directory(request, tmp_path):
    """The same spool, after a kill (all in the log) and after a stop in order (all in the file)."""
    asyncio.run(_fill(tmp_path / "stopped", tmp_path / "killed"))
    return tmp_path / request.param


def test_frames_are_listed_with_what_is_owed(directory):
    """ls: one line per frame, with names instead of bits."""
    with StoppedSpool(directory) as spool:
        first, second, third = spool.frames()
    assert (first.records, first.owed, first.settled) == (4, {"postgres", "dynamodb"}, {"dynamodb"})
    assert (second.records, second.owed, second.required, second.settled) == (2, {"postgres"}, {"postgres"}, set())
    assert (third.unresolved, third.owed) == (True, set())
    assert all(line.sound for line in (first, second, third))


def test_a_log_under_its_second_name_is_read(tmp_path):
    """A process that ended after an error left it so."""
    asyncio.run(_fill(tmp_path / "stopped", tmp_path / "killed"))
    (tmp_path / "killed" / disk.WAL).unlink()
    with StoppedSpool(tmp_path / "killed") as spool:
        assert sum(line.records for line in spool.frames()) == len(FIRST) + len(SECOND) + len(THIRD)


def test_records_are_shown_with_their_fates(directory):
    """Cat and export: all, those owed to a store, or one id."""
    with StoppedSpool(directory) as spool:
        assert [held.record for held in spool.records()] == [*FIRST, *SECOND, *THIRD]
        assert [held.record for held in spool.records(pending_for="postgres")] == [*FIRST, *SECOND]
        assert list(spool.records(pending_for="dynamodb")) == []
        (one,) = spool.records(log_id=FIRST[0].log_id)
        assert one.stores == {"postgres": "pending", "dynamodb": "dead_lettered"}
        (letter,) = spool.letters()
        assert letter.record == FIRST[0]
        (waiting,) = spool.letters(deferred=True)
        assert waiting.record == FIRST[1]


def test_verify_counts_and_finds_nothing_wrong(directory):
    """The control of the next test."""
    with StoppedSpool(directory) as spool:
        verdict = spool.verify()
    assert (verdict.frames, verdict.records, verdict.leftovers) == (3, 9, 2)
    assert verdict.owed == {"postgres": 6, "dynamodb": 1}
    assert verdict.problems == ()


def test_verify_finds_a_damaged_record(directory):
    """One flipped byte in a record, in the log or in the file."""
    name = disk.WAL if (directory / disk.WAL).exists() else disk.DATABASE
    with changed(directory / name) as content:
        content[content.rindex(b"1:xxxx") + 8] ^= 1
    with StoppedSpool(directory) as spool:
        assert spool.verify().problems


def test_looking_changes_no_byte(directory):
    """Every file is what it was, so that the next start sees what the kill left."""
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    with StoppedSpool(directory) as spool:
        list(spool.frames())
        list(spool.records())
        spool.verify()
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before


async def test_a_running_spool_is_refused(tmp_path):
    """Its control API is the way in; no spool at all is said so."""
    async with spool_at(tmp_path):
        with pytest.raises(SpoolLocked):
            StoppedSpool(tmp_path)
    with pytest.raises(SpoolRefused, match="no spool"):
        StoppedSpool(tmp_path / "elsewhere")
