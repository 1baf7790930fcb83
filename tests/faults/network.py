"""A network of our own: a namespace joined to this host by a cable, where packets can be dropped for real.

The host's side is 10.213.N.1, the namespace's 10.213.N.2; a relay in the namespace passes connections on to the host,
so that whoever connects to the relay sends packets that ``iptables`` in the namespace can swallow.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.faults.process import command, tool
from tests.parts.sidecar import ROOT, eventually


def _inside(name: str) -> list[str]:
    """Only the network is another one: ``ip netns exec`` would keep a copy of every mount, also of disks."""
    return ["nsenter", f"--net=/run/netns/{name}"]


@dataclass(frozen=True)
class Cable:
    """``host``:``port`` leads to the target, until the cable is cut."""

    name: str
    host: str
    port: int

    async def cut(self) -> None:
        """Packets vanish in both directions; nothing is refused, nothing is reset."""
        for chain in ("INPUT", "OUTPUT"):
            await command(*_inside(self.name), "iptables", "-I", chain, "-p", "tcp", "-j", "DROP")

    async def join(self) -> None:
        """As before."""
        await command(*_inside(self.name), "iptables", "-F")


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def forward(listen: tuple[str, int], target: tuple[str, int]) -> asyncio.Server:
    """Pass every connection to ``listen`` on to ``target``."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection(*target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_pump(reader, up_writer), _pump(up_reader, writer))

    return await asyncio.start_server(serve, *listen)


@asynccontextmanager
async def cable(target: tuple[str, int]) -> AsyncIterator[Cable]:
    """A namespace with a relay in it that leads to ``target`` on this host."""
    tool("iptables")
    number = os.getpid() % 200 + 20
    name, here, there = f"sidecar{number}", f"10.213.{number}.1", f"10.213.{number}.2"
    await command("ip", "netns", "add", name)
    try:
        await command(
            "ip", "link", "add", f"sc{number}h", "type", "veth", "peer", "name", f"sc{number}n", "netns", name
        )
        await command("ip", "addr", "add", f"{here}/24", "dev", f"sc{number}h")
        await command("ip", "link", "set", f"sc{number}h", "up")
        await command("ip", "-n", name, "addr", "add", f"{there}/24", "dev", f"sc{number}n")
        await command("ip", "-n", name, "link", "set", f"sc{number}n", "up")
        server = await forward((here, 0), target)
        port = server.sockets[0].getsockname()[1]
        words = [*_inside(name), sys.executable, "-m", "tests.faults.network", there, str(port), here]
        relay = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL)
        try:

            async def reachable() -> bool:
                try:
                    _, writer = await asyncio.open_connection(there, port)
                except OSError:
                    return False
                writer.close()
                return True

            await eventually(reachable, what="the relay")
            yield Cable(name, there, port)
        finally:
            relay.kill()
            relay.wait(10)
            server.close()
    finally:
        await command("ip", "netns", "del", name)


async def _relay(listen: str, port: int, target: str) -> None:
    server = await forward((listen, port), (target, port))
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_relay(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
