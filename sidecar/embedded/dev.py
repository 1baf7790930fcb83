"""``sidecar dev``: a private PostgreSQL, a local DynamoDB and the sidecar between them, in one terminal.

Everything lies below ``--data`` (default ``.run``): the PostgreSQL cluster and the spool are kept over restarts, and so
is the configuration, whose phase may be edited while it runs. The local DynamoDB forgets at restart while PostgreSQL
keeps, so its records are made again from PostgreSQL at start: no false divergence shows.

ORDER: PostgreSQL and DynamoDB side by side, the tables, the records, then ``sidecar serve`` as it would run anywhere.
Ctrl-C stops the sidecar first, so that it drains into databases that are still there.
"""

import argparse
import asyncio
import os
import secrets
from pathlib import Path
from typing import Final

import yaml

from sidecar import app, config
from sidecar.app.backfill import Request, backfill
from sidecar.app.delivery import build_stores
from sidecar.backfill.job import Job
from sidecar.clock import SystemClock
from sidecar.embedded.dynamodb import REGION, EmbeddedDynamoDB
from sidecar.embedded.postgres import EmbeddedPostgres
from sidecar.phase import DYNAMODB, POSTGRES
from sidecar.settings import Settings

_CREDENTIALS: Final = {
    "AWS_ACCESS_KEY_ID": "local",
    "AWS_SECRET_ACCESS_KEY": "local",
    "AWS_EC2_METADATA_DISABLED": "true",
}


async def run(args: argparse.Namespace) -> int:
    """Start all, serve until Ctrl-C, stop all; returns the sidecar's exit code."""
    data = _directory(args.data)
    os.environ.update({name: value for name, value in _CREDENTIALS.items() if name not in os.environ})
    postgres = EmbeddedPostgres(data / "postgres")
    dynamodb = EmbeddedDynamoDB()
    say(f"starting PostgreSQL and a local DynamoDB in {args.data} ...")
    try:
        await asyncio.gather(postgres.start(), dynamodb.start())
        loaded = _configuration(data, postgres, dynamodb, args)
        await _prepare(loaded.settings)
        _announce(loaded, data, postgres, dynamodb)
        return await app.serve(loaded)
    finally:
        await asyncio.gather(postgres.stop(), dynamodb.stop())
        say("stopped; PostgreSQL's data and the spool are kept")


def _directory(name: str) -> Path:
    path = Path(name).resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path


def say(text: str) -> None:
    """One line for the person at the terminal."""
    print(text, flush=True)  # noqa: T201  (the command line speaks by printing)


def _configuration(
    data: Path, postgres: EmbeddedPostgres, dynamodb: EmbeddedDynamoDB, args: argparse.Namespace
) -> config.Loaded:
    """The configuration file, made at the first start; afterwards only the databases' addresses are renewed."""
    path = data / "config" / "config.yaml"
    path.parent.mkdir(exist_ok=True)
    token = data / "token"
    if not token.exists():
        token.write_text(secrets.token_urlsafe(24) + "\n")
        token.chmod(0o600)
    document = yaml.safe_load(path.read_text()) if path.exists() else {"phase": "dual_write"}
    where = postgres.settings()
    document |= {
        "listen": {"app": args.app, "ops": args.ops},
        "spool": {"directory": str(data / "spool"), "allow_volatile": True, "cap_bytes": "256MiB"},
        "postgres": {
            "host": where.host,
            "port": where.port,
            "user": where.user,
            "password_file": str(data / "postgres" / "password"),
        },
        "dynamodb": {"endpoint_url": dynamodb.endpoint_url, "region": REGION},
        "control": {"token_file": str(token)},
        "drain": {"timeout": "10s", "stop_accepting_before": "200ms"},
    }
    path.write_text(
        "# Written by `sidecar dev`. Edit the phase while it runs: one adjacent step at a time.\n"
        + yaml.safe_dump(document, sort_keys=False)
    )
    return config.load(str(path), os.environ)


async def _prepare(settings: Settings) -> None:
    """Create the tables, and make DynamoDB's records again from PostgreSQL."""
    stores = build_stores(settings, SystemClock())
    try:
        await asyncio.gather(*(store.create() for store in stores.values()))
    finally:
        await asyncio.gather(*(store.close() for store in stores.values()))
    done = await backfill(settings, Request(Job(POSTGRES, DYNAMODB), skip_refused=True), lambda _: None)
    if done.stage != "done":  # Ctrl-C
        raise KeyboardInterrupt
    if done.copied:
        say(f"made {done.copied} records of DynamoDB again from PostgreSQL (the local DynamoDB forgets)")


def _announce(loaded: config.Loaded, data: Path, postgres: EmbeddedPostgres, dynamodb: EmbeddedDynamoDB) -> None:
    listen = loaded.settings.listen
    say(
        f"""
  application   http://{listen.app}       metrics and health  http://{listen.ops}
  PostgreSQL    127.0.0.1:{postgres.port} (user postgres, password in {data / "postgres" / "password"})
  DynamoDB      {dynamodb.endpoint_url} (region {REGION}, any credentials)
  configuration {loaded.path}  - edit the phase while it runs
  control token {data / "token"}
  phase         {loaded.settings.phase.label}

  Try:
    curl -sS {listen.app}/logs -H 'Content-Type: application/json' \\
      -d '{{"service_name": "CreditCheckService", "request_data": {{"amount": 125000.50}}, "correlation_id": "demo-1"}}'
    curl -sS {listen.app}/status
    curl -sS {listen.ops}/metrics | grep sidecar_store_

  Ctrl-C stops everything.
"""
    )
