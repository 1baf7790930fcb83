"""The ConfigMap as kubelet brings it: to each pod in its own moment, and whatever is in it."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import aiohttp
import pytest

from tests.integration.k8s.kubelet import Pod, config
from tests.parts import sidecar

eventually = partial(sidecar.eventually, seconds=90)  # a busy machine's patience; an idle one waits for none of it

PHASES = ("sql_only", "dual_write", "dual_write_read_dynamo", "dynamo_only")


@pytest.fixture
async def pods(postgres, dynamodb_store, dynamodb_settings, tmp_path: Path) -> AsyncIterator[list[Pod]]:
    """Three sidecars of one application in phase 0, on one PostgreSQL and one DynamoDB."""
    made = [Pod(tmp_path / f"pod-{n}", default_mode=mode) for n, mode in enumerate((0o644, 0o444, 0o400))]
    for pod in made:
        pod.apply(config("sql_only", postgres, dynamodb_settings))
    try:
        await asyncio.gather(*(pod.start() for pod in made))
        yield made
    finally:
        for pod in made:
            pod.close()


async def applied(pod: Pod) -> str:
    """The phase in force."""
    return str((await pod.json("/status"))["phase"]["applied"])


async def test_a_phase_change_reaches_each_pod_and_not_one_request_fails(pods, postgres, dynamodb_settings):
    """Each pod follows its own swap, one after the other, through every step and back, and every request succeeds."""
    stop = asyncio.Event()
    answers: list[int] = []

    async def post(pod: Pod) -> None:
        async with aiohttp.ClientSession() as session:
            while not stop.is_set():
                async with session.post(f"{pod.url}/logs", json={"service_name": "s"}) as answer:
                    answers.append(answer.status)
                await asyncio.sleep(0.005)

    load = [asyncio.create_task(post(pod)) for pod in pods]
    for phase in (*PHASES[1:], *reversed(PHASES[:-1])):
        for pod in pods:
            pod.apply(config(phase, postgres, dynamodb_settings))
            await eventually(lambda pod=pod, phase=phase: _is(pod, phase), what=phase)
    stop.set()
    await asyncio.gather(*load)
    assert len(answers) > 100
    assert set(answers) == {202}
    for pod in pods:
        await pod.drained()


async def _is(pod: Pod, phase: str) -> bool:
    return await applied(pod) == phase


async def test_a_key_that_is_removed_and_added_again_is_followed(pods, postgres, dynamodb_settings):
    """While config.yaml is gone the last good configuration is in force; back again, it counts."""
    pod = pods[0]
    pod.volume.project({"other.yaml": b"x: 1"})
    await eventually(lambda: _reload_successful(pod, 0), what="the missing file is seen")
    assert await applied(pod) == "sql_only"
    pod.apply(config("dual_write", postgres, dynamodb_settings))
    await eventually(lambda: _is(pod, "dual_write"), what="back")
    await eventually(lambda: _reload_successful(pod, 1), what="the gauge says so too")


async def _reload_successful(pod: Pod, value: int) -> bool:
    return (await pod.metrics())["sidecar_config_last_reload_successful"] == value


def _garbage(good: str) -> list[bytes]:
    """Forty kinds of what a ConfigMap should not hold."""
    data = good.encode()
    lines = good.splitlines()
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]" for n in range(9)
    )

    def phase(value: str) -> bytes:
        return "\n".join([f"phase: {value}", *lines[1:]]).encode()

    return [
        b"",
        b" \n\n",
        b"\0",
        b"\0" * 4096,
        b"# only a comment\n",
        b"null\n",
        b"[]\n",
        b"42\n",
        b"just text\n",
        b"---\n---\n",
        data[: len(data) // 2],
        data[: len(lines[0]) + 40],
        data.replace(b"phase", b"phrase", 1),
        data + b"\nunknown_key: 1\n",
        data + b"\nphase: dual_write\n",
        data + b"\n---\nphase: dual_write\n",
        data.replace(b"\n", b"\n\t", 3),
        b"\xff\xfe" + good.encode("utf-16-le")[:101],
        data[:100] + b"\xc3\x28" + data[100:],
        data + b"\n" + b"#" * 2_000_000,
        bomb.encode(),
        b"[" * 100_000,
        b"{" * 5_000,
        phase("4"),
        phase("-1"),
        phase("true"),
        phase("dual"),
        phase("sql_only,dual_write"),
        phase("[dual_write]"),
        phase("{a: 1}"),
        phase("''"),
        phase("!!python/object/apply:os.system ['true']"),
        phase("${NOT_SET_ANYWHERE}"),
        phase("*missing"),
        data + b"\nflags: {writes_to_dynamodb: false}\n",
        data + b"\nretry: 3\n",
        data + b"\ningest: {max_records: 0}\n",
        data + b"\ningest: {max_records: lots}\n",
        data + b"\ningest: {max_body_bytes: -1}\n",
        data + b"\ndrain:\n  timeout: 10 parsecs\n",
    ]


async def test_forty_kinds_of_garbage_change_nothing_and_are_told(pods, postgres, dynamodb_settings):
    """Each is refused, logged and on the gauge; the phase stays, requests succeed, the next good file counts."""
    pod = pods[0]
    good = config("dual_write", postgres, dynamodb_settings)
    pod.apply(good)
    await eventually(lambda: _is(pod, "dual_write"), what="dual_write")
    kinds = _garbage(good)
    assert len(kinds) == len(set(kinds)) == 40
    async with aiohttp.ClientSession() as session:
        for number, text in enumerate(kinds):
            pod.apply(text)
            await eventually(lambda: _reload_successful(pod, 0), what=f"garbage {number} is refused")
            async with session.post(f"{pod.url}/logs", json={"service_name": "s"}) as answer:
                assert answer.status == 202
            assert await applied(pod) == "dual_write", number
            pod.apply(good + f"# {number}\n")
            await eventually(lambda: _reload_successful(pod, 1), what=f"good after garbage {number}")
    refused = [e for e in pod.events() if "refused" in str(e)]
    assert len(refused) >= len(kinds)
