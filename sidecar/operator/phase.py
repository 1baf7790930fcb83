"""``sidecar phase show | plan | set | rollback``: the migration's control from the command line.

EXIT CODES. 0: what was asked for is so (``show``: nothing holds the phase; ``plan``: all gates of the next step are
green; ``set``, ``rollback``: the phase is in force on the sidecar that was asked). 1: not, or not yet: something holds
it, a gate is red, it was asked for and has not come within ``--wait``, or the file decides and stdout has the command
that changes it. 2: refused, nothing was changed: the gates that refuse it are on stderr.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from sidecar.config import load
from sidecar.operator.client import Client, Refused
from sidecar.operator.commands import client_of
from sidecar.phase import Phase, parse_phase

_EXIT_NO: Final = 1
_EXIT_REFUSED: Final = 2
_POLL: Final = 0.2  # seconds
_FORWARD: Final[Mapping[Phase, str]] = {
    Phase.DUAL_WRITE: "enable-dual-write",
    Phase.DUAL_WRITE_READ_DYNAMO: "switch-to-dynamo-reads",
    Phase.DYNAMO_ONLY: "disable-sql-writes",
}


def phase(args: argparse.Namespace) -> int:
    """Run one of the verbs. Raises SidecarError."""
    client = client_of(args, load(args.config, os.environ).settings)
    return _VERBS[args.verb](args, client)


def _show(args: argparse.Namespace, client: Client) -> int:
    state = client.get("/api/migration")
    if args.json:
        _print(json.dumps(state))
    else:
        _print(f"applied   {state['applied']}: {state['description']}")
        _print(f"desired   {state['desired']}, decided by the {state['authority']}")
        _print(f"epoch     {state['epoch']}")
        if state.get("forced"):
            _print(f"FORCED    {state['forced']}")
        for hold in state["holds"]:
            _print(f"held by   {hold['gate']}: {hold['observed']}; required: {hold['required']}; since {hold['since']}")
    return _EXIT_NO if state["holds"] or state["applied"] != state["desired"] else 0


def _plan(args: argparse.Namespace, client: Client) -> int:
    plan = _ask(client, args.phase, {}, dry_run=True)
    if args.json:
        _print(json.dumps(plan))
    else:
        _print_plan(plan)
    return 0 if plan["green"] else _EXIT_NO


def _set(args: argparse.Namespace, client: Client) -> int:
    return _change(args, client, args.phase)


def _rollback(args: argparse.Namespace, client: Client) -> int:
    to = args.to or _before(client.get("/api/migration")["applied"])
    return _change(args, client, to)


def _before(label: str) -> str:
    return Phase(max(parse_phase(label) - 1, 0)).label


def _change(args: argparse.Namespace, client: Client, target: str) -> int:
    body: dict[str, object] = {"reason": args.why}
    if args.force:
        body["force"] = args.force
    try:
        answer = _ask(client, target, body, dry_run=False)
    except Refused as error:
        if args.json:
            _print(json.dumps(error.document))
        for gate in error.document["error"].get("failed", ()):
            _say(f"{gate['gate']}: {gate['observed']}; required: {gate['required']}")
        _say("refused; nothing was changed")
        return _EXIT_REFUSED
    if args.json:
        _print(json.dumps(answer))
    for gate in answer.get("overridden", ()):
        _say(f"OVERRIDDEN: {gate}")
    if answer["applied"]:
        _say(f"{target} is in force")
        return 0
    if "patch" in answer:
        if not args.json:
            _print(answer["patch"])
        _say("the configuration file decides (phase_authority: file): nothing was changed; this command changes it")
        return _EXIT_NO
    return _await(client, target, args.wait)


def _await(client: Client, target: str, seconds: float) -> int:
    end = time.monotonic() + seconds
    while (state := client.get("/api/migration"))["applied"] != target and time.monotonic() < end:
        time.sleep(_POLL)
    if state["applied"] == target:
        _say(f"{target} is in force")
        return 0
    for hold in state["holds"]:
        _say(f"held by {hold['gate']}: {hold['observed']}; required: {hold['required']}")
    _say(f"{target} is desired; {state['applied']} is in force")
    return _EXIT_NO


def _ask(client: Client, target: str, body: dict[str, object], *, dry_run: bool) -> dict[str, Any]:
    """The route that leads there from where the sidecar is."""
    applied, wanted = parse_phase(client.get("/api/migration")["applied"]), parse_phase(target)
    query = "?dry_run=true" if dry_run else ""
    if wanted < applied:
        return client.post(f"/api/migration/rollback{query}", body | {"to": target})
    route = _FORWARD.get(wanted, "rollback")
    return client.post(f"/api/migration/{route}{query}", body | ({"to": target} if route == "rollback" else {}))


def _print_plan(plan: Mapping[str, Any]) -> None:
    _print(f"from {plan['from']} to {plan['to']}")
    for number, step in enumerate(plan["steps"], 1):
        _print(f"{number}. {step['from']} -> {step['to']}: {', '.join(step['gates']) or 'no gate'}")
    for gate in plan["gates"]:
        mark = "ok " if gate["ok"] else "RED"
        _print(f"{mark} {gate['gate']}: {gate['observed']}; required: {gate['required']}")
    for wait in plan["waits"]:
        _print(f"... {wait['gate']}: {wait['observed']}; required: {wait['required']}")


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _say(text: str) -> None:
    sys.stderr.write(f"sidecar phase: {text}\n")


_VERBS: Final[Mapping[str, Callable[[argparse.Namespace, Client], int]]] = {
    "show": _show,
    "plan": _plan,
    "set": _set,
    "rollback": _rollback,
}
