"""What the handlers are given; ``sidecar.app`` fills it in."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from aiohttp import web
from prometheus_client import CollectorRegistry

from sidecar.api.body import Budget
from sidecar.api.tokens import TokenFile
from sidecar.intake import Intake
from sidecar.metrics import Metrics
from sidecar.record import LogRecord
from sidecar.settings import Settings
from sidecar.spool.types import RecordStatus


@dataclass(frozen=True, slots=True)
class Found:
    """One read by id: the record or None, and who answered."""

    record: LogRecord | None
    served_by: str
    phase: str  # label, e.g. dual_write
    consistency: Literal["strong", "eventual"] = "strong"
    owed: int | None = None  # records that this sidecar still owes to the store that answered


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether the sidecar is started and its spool writable; ``reasons`` names what is not."""

    ready: bool
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ApiParts:
    """The parts behind the routes of the application listener.

    ``get`` raises StoreError where the store cannot answer; ``status`` gives the body of GET /status and names no
    secret; ``record_status`` is the spool's.
    """

    intake: Intake
    settings: Callable[[], Settings]
    metrics: Metrics
    status: Callable[[], Mapping[str, object]]
    record_status: Callable[[str], Awaitable[RecordStatus | None]]
    get: Callable[[str], Awaitable[Found]]
    read_token: TokenFile
    budget: Budget


@dataclass(frozen=True, slots=True)
class OpsParts:
    """The parts behind the ops listener."""

    registry: CollectorRegistry
    ready: Callable[[], Readiness]
    health: Callable[[], Mapping[str, object]]  # states and counts only: no payload, no setting


PARTS: web.AppKey[ApiParts] = web.AppKey("parts", ApiParts)
OPS_PARTS: web.AppKey[OpsParts] = web.AppKey("ops_parts", OpsParts)
