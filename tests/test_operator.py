"""The command line's own parts: progress, addresses, the client, and the verbs on a stopped sidecar's files."""

import asyncio
import hashlib
import http.server
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from sidecar import __main__ as cli
from sidecar.clock import SystemClock
from sidecar.errors import BadRequest, Busy, ConfigError, Forbidden, SidecarUnreachable, SpoolRefused, Unauthorized
from sidecar.operator import priority
from sidecar.operator.access import Stopped
from sidecar.operator.client import Address, Client
from sidecar.operator.progress import Progress, duration
from sidecar.phase import STORES
from sidecar.record import LogRecord, encode
from sidecar.settings import Dedup, Secret, Settings
from sidecar.settings import Spool as SpoolSettings
from sidecar.spool import Leftover, Obligation, Spool

ROOT = Path(__file__).resolve().parents[1]
SECRET = "payload-canary-5ecret"
BOTH = Obligation(2, frozenset(STORES))


# --- progress --------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def test_progress_says_how_far_how_fast_and_how_long_still():
    """100 of 1,000 after 10 s at 10/s: 90 s to go."""
    times = iter([0.0, 10.0])
    stream = Terminal()
    progress = Progress("delivered", stream=stream, now=lambda: next(times))
    progress.show(0, 1000)
    progress.show(100, 900, "postgres throttled (slow down)")
    last = stream.getvalue().rpartition("\r")[2]
    assert last == "delivered 100 of 1,000 (10.0 %), 10/s, ETA 1 min 30 s, postgres throttled (slow down)"


def test_progress_without_any_promises_nothing():
    """Nothing delivered in the window: no ETA is invented."""
    times = iter([0.0, 5.0])
    progress = Progress("delivered", stream=Terminal(), now=lambda: next(times))
    progress.show(7, 3)
    progress.show(7, 3)
    assert "ETA unknown" in progress.line(7, 3)


def test_progress_on_no_terminal_is_a_line_now_and_then():
    """A pod's log gets a line every ten seconds, not a thousand."""
    times = iter(range(31))
    stream = io.StringIO()
    progress = Progress("delivered", stream=stream, now=lambda: float(next(times)))
    for n in range(31):
        progress.show(n, 31 - n)
    assert len(stream.getvalue().splitlines()) == 4
    assert "\r" not in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (59, "59 s"), (60, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (356_400, "4 d 3 h")],
)
def test_durations_are_written_for_people(seconds, text):
    """The two largest units."""
    assert duration(seconds) == text


# --- the client ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("127.0.0.1:8080", Address("127.0.0.1", 8080)),
        ("0.0.0.0:8080", Address("127.0.0.1", 8080)),
        ("http://localhost:80/", Address("localhost", 80)),
        ("unix:/run/sidecar.sock", Address(path="/run/sidecar.sock")),
    ],
)
def test_an_address_is_dialled_where_the_sidecar_listens(listen, address):
    """Every address to listen on has one to dial."""
    assert Address.of_listen(listen) == address


def test_an_address_without_a_port_is_refused():
    """With what it should look like."""
    with pytest.raises(BadRequest, match="host:port"):
        Address.of_listen("localhost")


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers with what the server was told."""

    def do_GET(self) -> None:
        self.server.seen.append(dict(self.headers))  # type: ignore[attr-defined]
        status, body, length = self.server.answer  # type: ignore[attr-defined]
        self.protocol_version = "HTTP/1.1"
        self.close_connection = True
        self.send_response(status)
        if length == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(length if length is not None else len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def server():
    """An HTTP server that says anything: ``server.answer = status, body, announced length``."""
    made = http.server.HTTPServer(("127.0.0.1", 0), Answering)
    made.seen = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.mark.parametrize(
    ("status", "kind"), [(400, BadRequest), (401, Unauthorized), (403, Forbidden), (503, Busy), (302, Busy)]
)
def test_an_answer_that_is_no_2xx_is_the_error_that_it_was(server, status, kind):
    """With the sidecar's own words; no redirect is followed."""
    server.answer = status, b'{"error": {"code": "x", "message": "its own words"}}', None
    with pytest.raises(kind, match="its own words"):
        Client(Address(port=server.server_port)).get("/x")


def test_the_token_is_sent_and_shows_nowhere(server):
    """As a bearer token, beside who calls."""
    server.answer = 200, b"{}", None
    client = Client(Address(port=server.server_port), Secret("t0ken"))
    client.get("/x")
    (headers,) = server.seen
    assert headers["Authorization"] == "Bearer t0ken"
    assert "@" in headers["X-Actor"]
    assert "t0ken" not in repr(vars(client))


@pytest.mark.parametrize(
    ("body", "length"),
    [
        (b'{"a": 1}\n{"a": ', 1000),
        (b'{"a": 1}\n', 1000),
        (b"not json\n", 9),
        (b'9\r\n{"a": 1}\n\r\n', "chunked"),
        (b'9\r\n{"a": 1}\n\r\n9\r\n{"a"', "chunked"),
        (b"", "chunked"),
    ],
)
def test_a_stream_that_breaks_off_is_an_error_and_never_a_short_export(server, body, length):
    """Cut in the middle of a line, between two lines or two chunks, or garbage."""
    server.answer = 200, body, length
    with pytest.raises(SidecarUnreachable):
        list(Client(Address(port=server.server_port)).lines("/x"))


def test_a_whole_stream_is_read_to_its_end(server):
    """Chunks that do not end with the lines: the twin of the test above."""
    server.answer = 200, b'5\r\n{"a":\r\nb\r\n 1}\n{"a":2}\r\n1\r\n\n\r\n0\r\n\r\n', "chunked"
    assert list(Client(Address(port=server.server_port)).lines("/x")) == [{"a": 1}, {"a": 2}]


def test_nobody_listening_is_unreachable():
    """A port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(SidecarUnreachable, match="gave no whole answer"):
        Client(Address(port=port)).get("/status")


# --- on the files of a stopped sidecar -------------------------------------------------------------------------------


def a_record(service: str, n: int = 0) -> LogRecord:
    """A record with a payload that must not show."""
    return LogRecord(
        str(uuid.uuid4()), n, "INFO", service, SECRET, None, 200, True, None, 1, 1_790_000_000_000_000 + n, None, None
    )


@pytest.fixture
def files(tmp_path):
    """A configuration and a stopped spool: 3 frames for both stores; postgres has the first, with one dead letter."""
    directory = tmp_path / "spool"
    options = SpoolSettings(directory=str(directory), allow_volatile=True, ballast_bytes=0)
    records = [[a_record("a", n) for n in range(10)], [a_record("b")], [a_record("c")]]

    async def fill() -> None:
        spool = Spool.open(directory, options, Dedup(), STORES, SystemClock())
        for batch in records:
            await spool.append(batch, [encode(r) for r in batch], BOTH)
        (frame, *_) = await spool.cursor("postgres").take(10, 1)
        spool.cursor("postgres").settle(
            frame, [Leftover(3, "dead_letter", "permanent", "check_violation", "23514", attempts=2)]
        )
        await spool.close()

    asyncio.run(fill())
    config = tmp_path / "config.yaml"
    config.write_text(
        f"phase: dual_write\nlisten: {{app: 'unix:{tmp_path}/none.sock'}}\ndynamodb: {{region: eu-west-1}}\n"
        f"spool: {{directory: {directory}, allow_volatile: true, ballast_bytes: 0}}\n"
    )
    return config, directory, [r for batch in records for r in batch]


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """The verb in this process; exit code, stdout, stderr."""
    code = cli.main([str(a) for a in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def fingerprint(directory: Path) -> dict[str, str]:
    """Every file's content."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def test_looking_changes_no_byte_and_shows_no_payload(files, capsys):
    """ls, verify, dead-letter ls, with and without --json."""
    config, directory, _ = files
    before = fingerprint(directory)
    for words in (
        ["spool", "ls"],
        ["spool", "ls", "--json"],
        ["spool", "verify"],
        ["dead-letter", "ls"],
        ["dead-letter", "ls", "--json"],
    ):
        code, out, err = run(capsys, *words, "--config", config)
        assert code == 0, err
        assert SECRET not in out + err
        assert out
    assert fingerprint(directory) == before


def test_ls_says_what_each_store_is_owed(files, capsys):
    """Accounts and frames, as JSON."""
    config, _, _ = files
    _, out, _ = run(capsys, "spool", "ls", "--json", "--config", config)
    lines = [json.loads(line) for line in out.splitlines()]
    accounts = {line["store"]: line for line in lines if "store" in line}
    assert (accounts["postgres"]["pending"], accounts["dynamodb"]["pending"]) == (2, 12)
    assert accounts["postgres"]["dead_letters"] == {"permanent": 1}
    assert accounts["postgres"]["account"]["delivered"] == 9
    frames = [line["pending"] for line in lines if "seq" in line]
    assert frames == [["dynamodb"], ["dynamodb", "postgres"], ["dynamodb", "postgres"]]


def test_the_account_of_a_killed_sidecars_files_adds_up(tmp_path):
    """Its counters are written now and then; what is owed is never less than what is pending."""
    options = SpoolSettings(directory=str(tmp_path / "spool"), allow_volatile=True, ballast_bytes=0)

    async def fill() -> None:
        spool = Spool.open(tmp_path / "spool", options, Dedup(), STORES, SystemClock())
        batch = [a_record("k", n) for n in range(5)]
        await spool.append(batch, [encode(r) for r in batch], Obligation(3, frozenset({"dynamodb"})))
        shutil.copytree(tmp_path / "spool", tmp_path / "killed")
        await spool.close()

    asyncio.run(fill())
    accounts = {row["store"]: row for row in Stopped(tmp_path / "killed", Settings()).accounts()}
    assert (accounts["dynamodb"]["pending"], accounts["dynamodb"]["account"]["owed"]) == (5, 5)
    assert (accounts["postgres"]["pending"], accounts["postgres"]["account"]["owed"]) == (0, 0)


def test_cat_and_export_give_the_records_as_they_were_sent(files, capsys):
    """One by id (exit 1 where nothing is owed under it), or all that are owed."""
    config, _, records = files
    code, out, _ = run(capsys, "spool", "cat", records[3].log_id.upper(), "--config", config)
    assert code == 0
    (found,) = map(json.loads, out.splitlines())
    assert found["stores"] == {"dynamodb": "pending", "postgres": "dead_lettered"}
    assert found["record"]["request_data"] == SECRET
    code, out, err = run(capsys, "spool", "cat", str(uuid.uuid4()), "--config", config)
    assert (code, out) == (1, "")
    assert "nothing is owed" in err
    _, out, _ = run(capsys, "spool", "export", "--config", config)
    assert [json.loads(line)["record"]["log_id"] for line in out.splitlines()] == [r.log_id for r in records]


def test_verify_exits_with_1_where_a_byte_was_flipped(files, capsys):
    """And says what it found."""
    config, directory, _ = files
    file = directory / "spool.db"
    raw = bytearray(file.read_bytes())
    at = raw.index(SECRET.encode())
    raw[at] ^= 1
    file.write_bytes(raw)
    code, out, _ = run(capsys, "spool", "verify", "--config", config)
    assert code == 1
    assert json.loads(out)["problems"]


def test_redrive_and_discard_on_the_files_are_in_their_audit_trail(files, capsys):
    """A redriven one is owed again with its attempts and first error; a discarded one is gone; both by whom and why."""
    config, directory, records = files
    code, out, _ = run(capsys, "dead-letter", "redrive", "--id", records[3].log_id, "--config", config)
    assert (code, out) == (0, "1 dead letters tried again\n")
    _, out, _ = run(capsys, "spool", "cat", records[3].log_id, "--config", config)
    assert json.loads(out)["stores"]["postgres"] == "deferred"
    code, _, _ = run(capsys, "dead-letter", "redrive", "--id", records[3].log_id, "--config", config)
    assert code == 1, "there is none under this id any more"

    async def look():
        options = SpoolSettings(directory=str(directory), allow_volatile=True, ballast_bytes=0)
        spool = Spool.open(directory, options, Dedup(), STORES, SystemClock())
        (item,) = await spool.due("postgres", 2**62, 10)
        trail = await spool.audit_trail()
        await spool.close()
        return item, trail

    item, trail = asyncio.run(look())
    assert (item.attempts, item.reason, item.code) == (2, "check_violation", "23514")
    assert [(line.what, line.why) for line in trail] == [("redrive", "redriven from the command line")]
    assert trail[0].who.startswith("command line ")


def test_discard_needs_a_reason_and_a_selection(files, capsys):
    """Without --why a usage error, without a selection exit 2; nothing is discarded."""
    config, _, _ = files
    with pytest.raises(SystemExit) as caught:
        cli.main(["dead-letter", "discard", "--all", "--config", str(config)])
    assert caught.value.code == 2
    code, _, err = run(capsys, "dead-letter", "discard", "--why", "x", "--config", config)
    assert code == 2
    assert "say all" in err
    code, out, _ = run(capsys, "dead-letter", "discard", "--all", "--why", "test data", "--config", config)
    assert (code, out) == (0, "1 dead letters discarded\n")


@pytest.mark.parametrize("verb", ["redrive", "discard"])
@pytest.mark.parametrize(("flag", "value"), [("--store", "postgre"), ("--reason", "permanant")])
def test_a_misspelt_store_or_class_is_refused_and_not_taken_for_an_empty_one(files, capsys, verb, flag, value):
    """Saying 0 dead letters would be a lie; so in listings and exports."""
    config, _, _ = files
    for words in ([verb, "--why", "x"], ["ls"], ["export"]):
        code, out, err = run(capsys, "dead-letter", *words, flag, value, "--config", config)
        assert (code, out) == (2, "")
        assert value in err
        assert "allowed" in err


def test_a_discard_for_a_blank_reason_is_refused(files, capsys):
    """The audit trail would have to invent one."""
    config, _, _ = files
    code, out, err = run(capsys, "dead-letter", "discard", "--all", "--why", " ", "--config", config)
    assert (code, out) == (2, "")
    assert "--why" in err
    code, out, _ = run(capsys, "dead-letter", "discard", "--all", "--why", "known", "--config", config)
    assert (code, out) == (0, "1 dead letters discarded\n")


def test_a_table_shows_a_clients_control_characters_and_does_not_send_them(files, capsys):
    """A refused record's field is named by its sender: it must not move the cursor or forge a line."""
    config, directory, _ = files

    async def refuse() -> None:
        options = SpoolSettings(directory=str(directory), allow_volatile=True, ballast_bytes=0)
        spool = Spool.open(directory, options, Dedup(), STORES, SystemClock())
        await spool.refuse([(b"{}", "\x1b[2Jred\r\n\u009bforged", "unknown field")])
        await spool.close()

    asyncio.run(refuse())
    _, out, _ = run(capsys, "dead-letter", "ls", "--store", "door", "--config", config)
    assert len(out.splitlines()) == 2
    assert r"\x1b[2Jred\r\n\x9bforged" in out
    assert out.replace("\n", "").isprintable()


def test_a_reader_that_goes_ends_the_command_without_a_trace(files):
    """``| head`` is no defect."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "sidecar", "dead-letter", "export", "--config", str(files[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(30) == 141


def test_export_of_dead_letters_holds_the_records(files, capsys):
    """As NDJSON, filtered as asked."""
    config, _, records = files
    _, out, _ = run(capsys, "dead-letter", "export", "--store", "postgres", "--config", config)
    (line,) = map(json.loads, out.splitlines())
    assert line["record"]["log_id"] == records[3].log_id
    assert (line["attempts"], line["code"], line["record"]["request_data"]) == (2, "23514", SECRET)
    _, out, _ = run(capsys, "dead-letter", "export", "--store", "dynamodb", "--config", config)
    assert out == ""


def test_orders_on_the_files_are_in_force_from_the_next_start(files, capsys):
    """And the command says so."""
    config, directory, _ = files
    code, out, err = run(capsys, "store", "rate", "postgres", "50", "--why", "gently", "--config", config)
    assert code == 0
    assert json.loads(out)["orders"]["rate"]["records_per_second"] == 50
    assert "from the next start" in err
    code, _, err = run(capsys, "store", "rate", "postgres", "fast", "--why", "x", "--config", config)
    assert code == 2
    assert "a number, or none" in err
    for rate in ("0", "-5", "nan", "inf", "1e99"):
        code, out, err = run(capsys, "store", "rate", "postgres", rate, "--why", "x", "--config", config)
        assert (code, out) == (2, ""), rate
        assert "to stop, pause" in err
    code, out, err = run(capsys, "store", "pause", "postgres", "--why", " ", "--config", config)
    assert (code, out, "--why" in err) == (2, "", True)
    assert Stopped(directory, Settings()).verify()["problems"] == ()


def test_wait_on_the_files_ends_at_once(files, capsys):
    """Nobody delivers: exit 1 with what is pending."""
    config, _, _ = files
    code, _, err = run(capsys, "wait", "--config", config)
    assert code == 1
    assert "no sidecar runs, and 14 records are pending" in err


def test_wait_counts_what_is_owed_to_be_decided(files, capsys):
    """An acknowledged record of a fenced instance is pending for no store yet, and it is not delivered."""
    config, directory, _ = files

    async def fill() -> None:
        options = SpoolSettings(directory=str(directory), allow_volatile=True, ballast_bytes=0)
        spool = Spool.open(directory, options, Dedup(), STORES, SystemClock())
        batch = [a_record("f"), a_record("f")]
        await spool.append(batch, [encode(r) for r in batch], Obligation(1, frozenset(), unresolved=True))
        await spool.close()

    asyncio.run(fill())
    code, _, err = run(capsys, "wait", "--config", config)
    assert code == 1
    assert "16 records are pending" in err


@pytest.mark.parametrize("words", [["drain"], ["spool", "ls"], ["dead-letter", "redrive", "--all"]])
def test_a_directory_without_a_spool_is_refused_and_stays_as_it_is(words, files, tmp_path, capsys):
    """A typing error must not look like an empty spool."""
    config, _, _ = files
    empty = tmp_path / "typo"
    empty.mkdir()
    code, _, err = run(capsys, *words, "--spool", empty, "--config", config)
    assert code == 3
    assert "spool.db" in err
    assert list(empty.iterdir()) == []


def test_a_held_spool_is_refused_by_every_command_that_opens_it(files, capsys):
    """Another process has the lock: exit 3, and its files are not touched."""
    config, directory, _ = files
    options = SpoolSettings(directory=str(directory), allow_volatile=True, ballast_bytes=0)

    async def hold() -> list[tuple[int, str, str]]:
        spool = Spool.open(directory, options, Dedup(), STORES, SystemClock())
        try:
            commands = (["drain"], ["dead-letter", "redrive", "--all"], ["spool", "ls"])
            return [
                await asyncio.to_thread(_fresh, [*words, "--spool", str(directory), "--config", str(config)])
                for words in commands
            ]
        finally:
            await spool.close()

    for code, out, err in asyncio.run(hold()):
        assert (code, out) == (3, ""), err
        assert "in use by another" in err


def _fresh(words: list[str]) -> tuple[int, str, str]:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "sidecar", *words], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_a_missing_spool_is_refused_by_name():
    """From the part itself."""
    with pytest.raises(SpoolRefused, match="check the path"):
        Stopped(Path("/nonexistent"), Settings()).redrive(None, "x")  # type: ignore[arg-type]


# --- priority --------------------------------------------------------------------------------------------------------


def scheduled(before: str, word: str) -> list[int]:
    """Policy and niceness of a new process, and the policy of a thread that it starts, after ``take(word)``."""
    code = f"""
import os, threading
from sidecar.operator.priority import take
{before}
take({word!r})
seen = []
thread = threading.Thread(target=lambda: seen.append(os.sched_getscheduler(0)))
thread.start(); thread.join()
print(os.sched_getscheduler(0), os.nice(0), *seen)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return [int(part) for part in done.stdout.split()]


def test_long_work_is_idle_work_and_so_are_its_threads():
    """By the kernel's own word; ``normal`` changes nothing."""
    assert scheduled("", "low") == [os.SCHED_IDLE, 19, os.SCHED_IDLE]
    assert scheduled("", "normal") == [os.SCHED_OTHER, os.nice(0), os.SCHED_OTHER]


def test_where_no_idle_class_is_allowed_the_lowest_niceness_is_left():
    """A profile of a container may refuse the call; the work is done all the same."""
    refused = "def no(*_): raise PermissionError\nos.sched_setscheduler = no"
    assert scheduled(refused, "low") == [os.SCHED_OTHER, 19, os.SCHED_OTHER]


@pytest.mark.parametrize("word", ["low", "normal"])
@pytest.mark.parametrize("verb", ["backfill", "validate", "repair"])
def test_every_long_command_takes_its_priority_before_anything_else(verb, word, monkeypatch, capsys):
    """Before drivers are imported and threads are started; a command that only looks keeps its own."""
    taken = []

    def take(given):
        taken.append(given)
        raise ConfigError("here", seen="it ends", allowed="nothing more")

    monkeypatch.delenv("SIDECAR_PRIORITY")
    monkeypatch.setattr(priority, "take", take)
    assert cli.main([verb, *(["--priority", "normal"] if word == "normal" else [])]) == 2
    assert taken == [word]
    assert cli.main(["backfill", "status", "--config", "/nonexistent"]) == 2
    assert taken == [word]
    capsys.readouterr()


def test_the_environment_says_the_priority_where_the_command_does_not(monkeypatch, capsys):
    """And what it says must be one of the two."""
    monkeypatch.setenv("SIDECAR_PRIORITY", "high")
    assert cli.main(["validate"]) == 2
    assert "SIDECAR_PRIORITY" in capsys.readouterr().err
    monkeypatch.setenv("SIDECAR_PRIORITY", "normal")
    assert cli.main(["validate", "--config", "/nonexistent"]) == 2
    assert "SIDECAR_PRIORITY" not in capsys.readouterr().err
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
