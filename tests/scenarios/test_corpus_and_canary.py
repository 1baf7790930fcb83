"""What goes through both stores comes back byte for byte; what is secret comes out nowhere else."""

import asyncio
import contextlib
import json
import os

import aiohttp

from tests.corpus import json_texts, record_texts
from tests.parts import oracle
from tests.parts.fault_proxy import Refuse
from tests.parts.nursery import NURSERY
from tests.parts.postgres import connect
from tests.parts.sidecar import eventually

CANARY = "c4n4ry"
"""In every planted value; nothing of ours contains it."""
POISON = 666
JSON = {"Content-Type": "application/json"}


async def test_the_whole_corpus_is_the_same_in_both_stores_byte_for_byte(stand, http):
    """Every JSON text as a payload and every record of the corpus that is accepted: stored twice, read back, equal."""
    sidecar = await stand.sidecar(phase="dual_write_read_dynamo").start()
    sent: dict[str, str] = {}
    for case in json_texts("accept", "surrogate"):
        raw = b'{"service_name":"corpus","request_data":' + case.text + b"}"
        async with http.post(f"{sidecar.url}/logs", data=raw, headers={"Content-Type": "application/json"}) as answer:
            document = await answer.json()
            assert answer.status in {202, 422}, (case.name, document)
        if answer.status == 202:
            source = case.text.strip(b" \t\r\n")
            plain = source.startswith(b'"') or source == b"null"
            sent[document["log_id"]] = json.loads(source) if plain else source.decode()
    lines = b"\n".join(case.text for case in record_texts() if b"\n" not in case.text and b"\r" not in case.text)
    async with http.post(f"{sidecar.url}/logs", data=lines, headers={"Content-Type": "application/x-ndjson"}) as answer:
        document = await answer.json()
        assert answer.status == 207, document
    ids = sent.keys() | {log_id for log_id in document["log_ids"] if log_id}
    await sidecar.drained(60)
    sql, dynamo = await stand.in_postgres(), await stand.in_dynamodb()
    oracle.assert_same(sql, dynamo)
    assert sql.keys() == ids
    assert {log_id: sql[log_id]["request_data"] for log_id in sent} == sent
    assert len(sent) > 100
    for log_id in list(sent)[:20]:
        assert (await sidecar.json(f"/logs/{log_id}"))["request_data"] == sent[log_id]
    assert not any("dead_letter_records{" in k and v for k, v in (await sidecar.metrics()).items() if "door" not in k)


def planted(n: int, **fields) -> dict:
    """A record with the canary in every text that a client chooses, the service's name apart."""
    return {
        "service_name": "svc",
        "request_data": f'{{"password": "{CANARY}-request"}}',
        "response_data": f"{CANARY}-response",
        "error_message": f"{CANARY}-error",
        "user_id": f"{CANARY}-user",
        "processing_time_ms": n,
        **fields,
    }


async def test_planted_secrets_are_in_the_stores_and_nowhere_else(stand, tmp_path):
    """Payloads, tokens, the database's password, AWS keys: not in logs, metrics, status, errors, listings, exit texts.

    While stores refuse, poison is found by its CHECK (PostgreSQL quotes the row), the configuration breaks, the process
    is killed and started again.
    """
    admin = await connect(stand.postgres)
    await admin.execute(f"ALTER TABLE integration_logs ADD CHECK (processing_time_ms <> {POISON})")
    role = f"role_{os.getpid()}_{id(stand)}"
    await admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{CANARY}-password'")
    await admin.execute(f"GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA public TO {role}")
    token, reads = tmp_path / "token", tmp_path / "reads"
    token.write_text(f"{CANARY}-control-token-0123456789")
    reads.write_text(f"{CANARY}-reads-token-0123456789")
    for path in (token, reads):
        path.chmod(0o400)
    sidecar = stand.sidecar(
        postgres={"user": role, "password": f"{CANARY}-password"},
        control={"token_file": str(token)},
        reads={"token_file": str(reads)},
        logging={"level": "debug"},
        phase="dual_write_read_dynamo",
    )
    sidecar.environ |= {"AWS_ACCESS_KEY_ID": f"{CANARY}-key", "AWS_SECRET_ACCESS_KEY": f"{CANARY}-aws-secret"}
    heard: dict[str, str] = {}

    async def ask(method: str, path: str, *, ops: bool = False, **options) -> int:
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, (sidecar.ops if ops else sidecar.url) + path, **options) as answer,
        ):
            heard[f"{method} {path} {answer.status}"] = f"{answer.headers} {await answer.text()}"
            return answer.status

    def run(*words: str) -> None:
        done = NURSERY.run(["sidecar", *words], {**os.environ, **sidecar.environ})
        heard[" ".join(words[:2])] = done.stdout + done.stderr

    await sidecar.start()
    stand.dynamo.on("*", Refuse(400, "ValidationException", f"The value {CANARY}-aws-secret is not allowed"), times=2)
    batch = [planted(POISON if n == 5 else n) for n in range(10)]
    batch.append(planted(1, status_code=f"{CANARY}-not-a-number"))
    assert await ask("POST", "/logs", json=batch) == 207
    assert await ask("POST", "/logs", json=planted(2, log_type=f"{CANARY}\u0000")) == 422
    assert await ask("POST", "/logs", data=f'{{"service_name": "{CANARY}'.encode(), headers=JSON) == 400
    one = planted(3, log_id="3f2b8c1e-5a4d-4e6f-9a8b-7c6d5e4f3a2b", log_timestamp="2026-01-01T00:00:00Z")
    assert await ask("POST", "/logs", json=one) == 202
    assert await ask("POST", "/logs", json={**one, "user_id": f"{CANARY}-other"}) == 409
    bad = {"Authorization": f"Bearer {CANARY}-wrong"}
    assert await ask("POST", "/api/migration/rollback", headers=bad) in {401, 403, 404}
    assert await ask("GET", f"/logs?correlation_id=x&limit={CANARY}", headers=bad) in {401, 403}

    async def dead() -> bool:
        return any("dead_letter_records{" in k and "postgres" in k and v for k, v in (await sidecar.metrics()).items())

    await eventually(dead, what="the poisoned record is a dead letter")
    await stand.sql.refuse()
    sidecar.mount.write({"config.yaml": f"phase: [{CANARY}\npostgres: {{password: {CANARY}-password"})

    async def refused() -> bool:
        return (await sidecar.metrics())["sidecar_config_last_reload_successful"] == 0

    await eventually(refused, what="the configuration is refused")
    for path in ("/status", "/openapi.json", f"/logs/{one['log_id']}", f"/logs/{one['log_id']}/status", "/nowhere"):
        await ask("GET", path)
    for path in ("/metrics", "/healthz", "/readyz", "/livez"):
        await ask("GET", path, ops=True)
    run("validate-config", "--config", str(sidecar.mount.directory / "config.yaml"))
    sidecar.configure()
    config = ["--config", str(sidecar.mount.directory / "config.yaml")]
    run("print-config", *config)
    sidecar.kill()
    for words in (("spool", "ls"), ("spool", "verify"), ("dead-letter", "ls")):
        run(*words, "--spool", str(sidecar.spool))
    await admin.execute(f"ALTER ROLE {role} PASSWORD '{CANARY}-changed'")  # a log-in that is refused
    await stand.sql.normal()
    await sidecar.start()
    assert await ask("POST", "/logs", json=planted(4)) == 202

    async def blocked() -> bool:
        return (await sidecar.metrics())['sidecar_store_state{state="blocked",store="postgres"}'] == 1

    await eventually(blocked, what="the log-in is refused")
    await ask("GET", "/status")
    await admin.execute(f"ALTER ROLE {role} PASSWORD '{CANARY}-password'")
    await sidecar.drained(60)
    sidecar.terminate()
    assert await sidecar.exit_code() == 0
    heard["log"] = sidecar.log.read_text()
    leaks = {where: text for where, text in heard.items() if CANARY in text}
    assert not leaks, {where: text[max(0, text.index(CANARY) - 200) :][:300] for where, text in leaks.items()}
    assert CANARY in json.dumps(list((await stand.in_postgres()).values()))
    assert CANARY in json.dumps(list((await stand.in_dynamodb()).values()))
    sidecar.events()  # every line is still JSON
    with contextlib.suppress(asyncio.CancelledError):
        await admin.execute(f"REASSIGN OWNED BY {role} TO CURRENT_USER")
        await admin.execute(f"DROP OWNED BY {role}")
        await admin.execute(f"DROP ROLE {role}")
    await admin.close()
