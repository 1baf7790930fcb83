"""The mappings that need no configuration, in the language of the configuration; docs/clients has a page for each.

Each takes the names that its client writes by default, and besides those that people usually give.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from sidecar.declared_mapping import DeclaredMapping, FieldSource, Identity, LevelSource, TimeFormat

OTLP: Final = "otlp"
UNKNOWN: Final = "unknown_service"
"""OpenTelemetry's own name for a service that nobody named."""

_LEVELS: Final = {
    "TRACE": ("trace", "verbose", "silly", "finest"),
    "DEBUG": ("debug",),
    "INFO": ("info", "information", "informational", "notice", "http"),
    "WARNING": ("warn", "warning"),
    "ERROR": ("error", "err"),
    "FATAL": ("fatal", "critical", "crit", "alert", "emerg", "emergency", "panic"),
}
_FAILURE: Final = ("ERROR", "FATAL")


def _level(*paths: str, numbers: Mapping[str, str] | None = None) -> LevelSource:
    names = tuple((name, log_type) for log_type, names in _LEVELS.items() for name in names)
    return LevelSource(paths, (*names, *(numbers or {}).items()), _FAILURE)


def _mapping(
    level: LevelSource,
    *,
    time: tuple[str, ...],
    formats: tuple[TimeFormat, ...] = ("iso",),
    events: tuple[str, ...] = (),
    identity: Identity = "content",
    service_name: tuple[str, ...] = (),
    error_message: tuple[str, ...] = (),
    fields: Mapping[str, tuple[str, ...]],
) -> DeclaredMapping:
    sources = {
        "service_name": FieldSource(service_name, default=UNKNOWN),
        "log_timestamp": FieldSource(time, formats=formats),
        "error_message": FieldSource(error_message, on_failure=True),
        **{field: FieldSource(paths) for field, paths in fields.items()},
    }
    return DeclaredMapping(fields=tuple(sources.items()), level=level, events=events, identity=identity)


_GENERAL: Final[Mapping[str, tuple[str, ...]]] = {
    "application_id": ("/application_id", "/applicationId"),
    "correlation_id": ("/correlation_id", "/correlationId", "/trace_id", "/traceId", "/request_id", "/requestId"),
    "user_id": ("/user_id", "/userId"),
    "status_code": ("/status_code", "/statusCode"),
    "processing_time_ms": ("/processing_time_ms", "/duration_ms", "/durationMs", "/responseTime"),
}
_KUBERNETES: Final = ("/kubernetes/labels/app.kubernetes.io~1name", "/kubernetes/container_name")

READY_MADE: Final[Mapping[str, DeclaredMapping]] = MappingProxyType(
    {
        "serilog": _mapping(
            _level("/Level", "/@l"),
            time=("/Timestamp", "/@t"),
            events=("events",),
            service_name=(
                "/Properties/ServiceName",
                "/Properties/Application",
                "/Properties/ApplicationName",
                "/ServiceName",
                "/Application",
                "/ApplicationName",
            ),
            error_message=("/Exception", "/@x", "/RenderedMessage", "/@m", "/MessageTemplate", "/@mt"),
            fields={
                "application_id": ("/Properties/ApplicationId", "/ApplicationId"),
                "correlation_id": (
                    *("/Properties/CorrelationId", "/CorrelationId"),
                    *("/TraceId", "/@tr", "/Properties/RequestId"),
                ),
                "user_id": ("/Properties/UserId", "/UserId"),
                "status_code": ("/Properties/StatusCode", "/StatusCode"),
                "processing_time_ms": ("/Properties/ElapsedMilliseconds", "/Properties/Elapsed", "/Elapsed"),
            },
        ),
        "fluent-bit": _mapping(
            _level("/level", "/severity", "/log_level"),
            time=("/date", "/@timestamp", "/timestamp"),
            formats=("epoch_s", "iso"),
            service_name=("/service_name", "/service", *_KUBERNETES, "/container_name", "/tag"),
            error_message=("/error", "/message", "/log", "/MESSAGE"),
            fields=_GENERAL,
        ),
        "vector": _mapping(
            _level("/level", "/severity", "/log_level"),
            time=("/timestamp",),
            service_name=("/service_name", "/service", *_KUBERNETES, "/appname", "/container_name"),
            error_message=("/error", "/message"),
            fields=_GENERAL,
        ),
        "winston": _mapping(
            _level("/level"),
            time=("/timestamp",),
            formats=("iso", "epoch_ms"),
            identity="minted",
            service_name=("/service_name", "/serviceName", "/service", "/label"),
            error_message=("/error/message", "/stack", "/message"),
            fields=_GENERAL,
        ),
        "pino": _mapping(
            _level(
                "/level",
                numbers={
                    "1-19": "TRACE",
                    "20-29": "DEBUG",
                    "30-39": "INFO",
                    "40-49": "WARNING",
                    "50-59": "ERROR",
                    "60-99": "FATAL",
                },
            ),
            time=("/time",),
            formats=("epoch_ms", "iso"),
            events=("logs",),
            service_name=("/service_name", "/serviceName", "/service", "/name"),
            error_message=("/err/message", "/error/message", "/msg"),
            fields={
                **_GENERAL,
                "correlation_id": (*_GENERAL["correlation_id"], "/reqId", "/req/id"),
                "status_code": ("/res/statusCode", *_GENERAL["status_code"]),
            },
        ),
        "syslog-ng": _mapping(
            _level(
                "/PRIORITY",
                "/LEVEL",
                "/SEVERITY",
                numbers={"0-2": "FATAL", "3": "ERROR", "4": "WARNING", "5-6": "INFO", "7": "DEBUG"},
            ),
            time=("/ISODATE", "/S_ISODATE", "/R_ISODATE"),
            service_name=("/service_name", "/PROGRAM"),
            error_message=("/MESSAGE",),
            fields=_GENERAL,
        ),
        OTLP: _mapping(
            _level(
                "/severityNumber",
                "/severityText",
                numbers={
                    "1-4": "TRACE",
                    "5-8": "DEBUG",
                    "9-12": "INFO",
                    "13-16": "WARNING",
                    "17-20": "ERROR",
                    "21-24": "FATAL",
                },
            ),
            time=("/timeUnixNano", "/observedTimeUnixNano"),
            formats=("epoch_ns",),
            service_name=("/resource/attributes/service.name",),
            error_message=("/attributes/exception.message", "/body"),
            fields={
                "correlation_id": ("/traceId",),
                "application_id": ("/attributes/application_id", "/resource/attributes/application_id"),
                "user_id": ("/attributes/user.id", "/attributes/enduser.id"),
                "status_code": ("/attributes/http.response.status_code", "/attributes/http.status_code"),
                "processing_time_ms": ("/attributes/processing_time_ms",),
            },
        ),
    }
)
"""Name -> mapping. ``otlp`` is that of POST /v1/logs, the others answer under POST /ingest/{name}."""
