"""Which signal does what to a running sidecar."""

import asyncio
import signal

from sidecar.reload import Watcher


class Signals:
    """SIGTERM and SIGINT stop, SIGHUP looks at the configuration."""

    def __init__(self, stop: asyncio.Event, watcher: Watcher) -> None:
        self._loop = asyncio.get_running_loop()
        self._handlers = {signal.SIGTERM: stop.set, signal.SIGINT: stop.set, signal.SIGHUP: watcher.trigger}

    def __enter__(self) -> None:
        for number, handler in self._handlers.items():
            self._loop.add_signal_handler(number, handler)

    def __exit__(self, *_: object) -> None:
        for number in self._handlers:
            self._loop.remove_signal_handler(number)
