"""``otel.py PORT COUNT PAUSE BAD``: COUNT records through logging, one each PAUSE ms, that numbered BAD malformed."""

import logging
import sys
import time

from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.sdk._logs import LoggerProvider, LoggingHandler
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.resources import Resource

port, count, pause, bad = map(int, sys.argv[1:])
exporter = OTLPLogExporter(endpoint=f"http://127.0.0.1:{port}/v1/logs", timeout=60)
provider = LoggerProvider(resource=Resource.create({"service.name": "otel-python"}))
provider.add_log_record_processor(
    BatchLogRecordProcessor(
        exporter,
        max_export_batch_size=50,
        schedule_delay_millis=200,
        export_timeout_millis=60_000,
        max_queue_size=10_000,
    )
)
logger = logging.getLogger("billing")
logger.setLevel(logging.INFO)
logger.addHandler(LoggingHandler(logger_provider=provider))
logger.propagate = False
for n in range(count):
    if n == bad:
        logger.info("x" * 400_000, extra={"n": n})
    else:
        logger.info("record", extra={"n": n})
    time.sleep(pause / 1000)
provider.force_flush(60_000)
provider.shutdown()
