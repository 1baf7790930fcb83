"""A DynamoDB that lets through what an IAM policy allows, and answers AccessDenied to the rest, as AWS does.

Of IAM's language as much as the policies of k8s/iam use: Allow, actions, resources with a final ``*``, and conditions
on ``dynamodb:LeadingKeys``. Anything else in a policy fails the test.
"""

import fnmatch
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aiohttp import web

from tests.integration.k8s.tools import ROOT
from tests.parts.fault_proxy import FaultProxy

TABLES = ("integration_logs", "integration_logs_fleet")  # as the policies name them
_MATCHES = {
    "ForAllValues:StringEquals": lambda value, allowed: value in allowed,
    "ForAllValues:StringLike": lambda value, allowed: any(fnmatch.fnmatchcase(value, each) for each in allowed),
}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class Policy:
    """One file of k8s/iam, for these tables instead of the ones that it names."""

    def __init__(self, name: str, tables: Sequence[str] = TABLES) -> None:
        self._statements = json.loads((ROOT / "k8s" / "iam" / name).read_text())["Statement"]
        self._names = dict(zip(tables, TABLES, strict=True))

    def allows(self, operation: str, body: Mapping[str, Any]) -> bool:
        """Whether every table and index of that request may be used so."""
        return all(self._allowed(operation, *each) for each in _asked(operation, body))

    def _allowed(self, operation: str, table: str, index: str | None, keys: Sequence[str]) -> bool:
        resource = self._names.get(table, table) + (f"/index/{index}" if index else "")
        for statement in self._statements:
            assert statement.keys() <= {"Sid", "Effect", "Action", "Resource", "Condition"}
            assert statement["Effect"] == "Allow"
            patterns = [each.partition(":table/")[2] for each in _list(statement["Resource"])]
            if (
                f"dynamodb:{operation}" in _list(statement["Action"])
                and any(fnmatch.fnmatchcase(resource, pattern) for pattern in patterns)
                and _holds(statement.get("Condition", {}), keys)
            ):
                return True
        return False


def _holds(conditions: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> bool:
    for operator, condition in conditions.items():
        assert condition.keys() == {"dynamodb:LeadingKeys"}
        allowed = condition["dynamodb:LeadingKeys"]
        if operator == "Null":
            assert allowed == "false"
            if not keys:
                return False
        elif not all(_MATCHES[operator](key, _list(allowed)) for key in keys):
            return False
    return True


def _asked(operation: str, body: Mapping[str, Any]) -> Iterator[tuple[str, str | None, list[str]]]:
    """Table, index and partition keys of a request, for each table in it."""
    if "RequestItems" in body:
        assert operation in {"BatchGetItem", "BatchWriteItem"}
        for table in body["RequestItems"]:
            yield table, None, []
    else:
        key = body.get("Key", body.get("Item", {}))
        found = [each for name in ("pk", "log_id") for each in key.get(name, {}).values()]
        yield body["TableName"], body.get("IndexName"), found


class Guarded(FaultProxy):
    """See the module; ``denied`` keeps what was refused."""

    def __init__(self, upstream: str, policy: Policy) -> None:
        super().__init__(upstream)
        self.policy = policy
        self.denied: list[tuple[str, dict[str, Any]]] = []

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        operation = request.headers["X-Amz-Target"].partition(".")[2]
        body = json.loads(await request.read())
        if not self.policy.allows(operation, body):
            self.denied.append((operation, body))
            answer = {"__type": "com.amazon.coral.service#AccessDeniedException", "message": "not authorized"}
            return web.json_response(answer, status=400)
        return await super()._handle(request)
