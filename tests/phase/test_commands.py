"""``sidecar phase`` and ``sidecar fleet``: what is asked, what is printed, and the exit code for scripts."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from sidecar import __main__ as cli
from sidecar.operator import fleet, phase
from sidecar.operator.client import Refused

STATE = {
    "applied": "dual_write",
    "desired": "dual_write",
    "description": "Dual write",
    "authority": "file",
    "epoch": 3,
    "forced": None,
    "holds": [],
}
HOLD = {"gate": "lag", "observed": "9 s", "required": "0 s", "since": "2026-01-01T00:00:00Z"}
PLAN = {
    "from": "dual_write",
    "to": "dual_write_read_dynamo",
    "steps": [{"from": "dual_write", "to": "dual_write_read_dynamo", "gates": ["lag"]}],
    "gates": [{**HOLD, "ok": False}],
    "waits": [],
    "green": False,
}
INSTANCE = {
    "instance": "a",
    "state": "live",
    "phase": "dual_write",
    "epoch": 3,
    "pending": {"postgres": 2},
    "dead_letters": {},
    "oldest_pending_age_seconds": {"postgres": 4.2},
    "counts": True,
    "fenced": False,
}


class Client:
    """Answers as the test says; keeps what was asked."""

    def __init__(self) -> None:
        self.documents: dict[str, Any] = {"/api/migration": dict(STATE), "/api/migration/fleet": {}}
        self.reply: Any = {"applied": True, "desired": "dual_write", "overridden": []}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.after: Callable[[], None] = lambda: None

    def get(self, path: str) -> Any:
        self.after()
        return self.documents[path]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        self.asked.append((path, body))
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply


@pytest.fixture
def client(monkeypatch, tmp_path):
    """A sidecar in phase 1 that says yes."""
    made = Client()
    config = tmp_path / "config.yaml"
    config.write_text("phase: dual_write\ndynamodb: {region: eu-west-1}\n")
    monkeypatch.setenv("SIDECAR_CONFIG", str(config))
    for module in (phase, fleet):
        monkeypatch.setattr(module, "client_of", lambda _args, _settings: made)
        monkeypatch.setattr(module, "load", lambda *_: type("Loaded", (), {"settings": None}))
    return made


def test_show_is_0_where_nothing_holds_the_phase_and_1_where_something_does(client, capsys):
    """The reason is printed, a forced change cannot be overlooked."""
    assert cli.main(["phase", "show"]) == 0
    client.documents["/api/migration"] |= {"holds": [HOLD], "forced": "because"}
    assert cli.main(["phase", "show"]) == 1
    out = capsys.readouterr().out
    assert "held by   lag: 9 s; required: 0 s; since 2026-01-01T00:00:00Z" in out
    assert "FORCED    because" in out


def test_plan_changes_nothing_and_is_1_where_a_gate_is_red(client, capsys):
    """A rehearsal of the route that leads there."""
    client.reply = dict(PLAN)
    assert cli.main(["phase", "plan", "dual_write_read_dynamo"]) == 1
    assert "RED lag: 9 s; required: 0 s" in capsys.readouterr().out
    client.reply["green"] = True
    assert cli.main(["phase", "plan", "sql_only", "--json"]) == 0
    assert [path for path, _ in client.asked] == [
        "/api/migration/switch-to-dynamo-reads?dry_run=true",
        "/api/migration/rollback?dry_run=true",
    ]
    assert json.loads(capsys.readouterr().out)["green"] is True


def test_set_asks_the_route_of_the_phase_with_the_reason(client, capsys):
    """0: it is in force. Backwards it is a rollback to that phase."""
    assert cli.main(["phase", "set", "dual_write_read_dynamo", "--why", "w", "--force", "f"]) == 0
    assert cli.main(["phase", "set", "sql_only", "--why", "w"]) == 0
    assert cli.main(["phase", "rollback", "--why", "w"]) == 0
    assert client.asked == [
        ("/api/migration/switch-to-dynamo-reads", {"reason": "w", "force": "f"}),
        ("/api/migration/rollback", {"reason": "w", "to": "sql_only"}),
        ("/api/migration/rollback", {"reason": "w", "to": "sql_only"}),
    ]
    assert "sql_only is in force" in capsys.readouterr().err


def test_a_refusal_is_2_and_names_the_gates(client, capsys):
    """Nothing was changed; the reasons go to stderr, so that stdout stays for programs."""
    client.reply = Refused("m", {"error": {"failed": [HOLD]}})
    assert cli.main(["phase", "set", "dual_write_read_dynamo", "--why", "w"]) == 2
    shown = capsys.readouterr()
    assert (shown.out, "lag: 9 s; required: 0 s" in shown.err, "nothing was changed" in shown.err) == ("", True, True)


def test_where_the_file_decides_stdout_is_the_command(client, capsys):
    """Nothing was changed, so it is 1; the command can be piped to a shell."""
    client.reply = {"applied": False, "desired": "dual_write", "overridden": [], "patch": "kubectl patch x"}
    assert cli.main(["phase", "set", "dual_write_read_dynamo", "--why", "w"]) == 1
    assert capsys.readouterr().out == "kubectl patch x\n"


def test_wait_ends_with_the_phase_or_with_the_reason(client, capsys):
    """0 when it has come, 1 with what holds it when not."""
    client.reply = {"applied": False, "desired": "dual_write_read_dynamo", "overridden": ["lag"]}
    client.documents["/api/migration"]["holds"] = [HOLD]
    assert cli.main(["phase", "set", "dual_write_read_dynamo", "--why", "w"]) == 1
    err = capsys.readouterr().err
    assert "OVERRIDDEN: lag" in err
    assert "held by lag: 9 s" in err
    looks = iter(range(10))

    def comes() -> None:
        if next(looks) == 3:
            client.documents["/api/migration"]["applied"] = "dual_write_read_dynamo"

    client.after = comes
    assert cli.main(["phase", "set", "dual_write_read_dynamo", "--why", "w", "--wait", "20"]) == 0


@pytest.mark.parametrize(
    ("instances", "unreachable", "code"),
    [
        ([INSTANCE], {}, 0),
        ([INSTANCE, INSTANCE | {"state": "gone", "counts": False}], {}, 0),
        ([INSTANCE, INSTANCE | {"state": "silent"}], {}, 1),
        ([INSTANCE | {"fenced": True}], {}, 1),
        ([INSTANCE], {"dynamodb": "cannot be reached"}, 1),
    ],
)
def test_fleet_is_1_where_an_instance_that_counts_is_not_well(client, capsys, instances, unreachable, code):
    """The table has every instance; who is gone holds nobody up."""
    record = {"epoch": 3, "phase": "dual_write", "desired": "dual_write"}
    client.documents["/api/migration/fleet"] = {"instances": instances, "unreachable": unreachable, "record": record}
    assert cli.main(["fleet"]) == code
    shown = capsys.readouterr()
    assert shown.out.count("dual_write") == len(instances) + 2
    assert all(store in shown.err for store in unreachable)
