"""A DynamoDB that answers reads as fast as HTTP allows: what another one answered to the same request before.

``python -m benchmarks.replay_dynamodb URL`` prints ``{"port": ...}``. Query, BatchGetItem and GetItem are asked of URL
once and answered from memory until something is written; everything else is passed on. For benchmarks of reads: the
local DynamoDB takes tens of milliseconds of a processor that PostgreSQL and the generator need.
"""

import asyncio
import json
import sys

import aiohttp
import uvloop
from aiohttp import web

READS = frozenset({"Query", "BatchGetItem", "GetItem"})


async def main(upstream: str) -> None:
    answers: dict[tuple[str, bytes], tuple[int, bytes]] = {}
    async with aiohttp.ClientSession() as session:

        async def answer(request: web.BaseRequest) -> web.Response:
            operation = request.headers.get("X-Amz-Target", "").rpartition(".")[2]
            body = await request.read()
            found = answers.get((operation, body))
            if found is None:
                headers = {k: v for k, v in request.headers.items() if k not in ("Host", "Content-Length")}
                async with session.post(upstream, data=body, headers=headers) as reply:
                    found = reply.status, await reply.read()
                if operation not in READS:
                    answers.clear()
                elif found[0] == 200:
                    answers[operation, body] = found
            return web.Response(status=found[0], body=found[1], content_type="application/x-amz-json-1.0")

        runner = web.ServerRunner(web.Server(answer))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        print(json.dumps({"port": runner.addresses[0][1]}), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
