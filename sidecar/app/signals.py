"""Which signal does what to a running sidecar."""

import asyncio
import logging
import signal

from sidecar.reload import Watcher

log = logging.getLogger(__name__)


def bear_hangups() -> None:
    """Until there is a watcher SIGHUP, which ends a process by default, changes nothing: the first look sees all."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, log.info, "SIGHUP while starting")


class Signals:
    """SIGTERM and SIGINT stop, SIGHUP looks at the configuration.

    Once stopping, another SIGTERM or SIGINT changes nothing: the drain ends at its deadline anyway, and a process that
    died of the second one would leave its files as after a crash, with an exit code that says so. It stays like this
    until the event loop is closed.
    """

    def __init__(self, stop: asyncio.Event, watcher: Watcher) -> None:
        self._loop = asyncio.get_running_loop()
        self._stops = (signal.SIGTERM, signal.SIGINT)
        self._stop = stop
        self._watcher = watcher

    def __enter__(self) -> None:
        for number in self._stops:
            self._loop.add_signal_handler(number, self._stop.set)
        self._loop.add_signal_handler(signal.SIGHUP, self._watcher.trigger)

    def __exit__(self, *_: object) -> None:
        for number in (*self._stops, signal.SIGHUP):
            self._loop.add_signal_handler(number, _already_stopping, number)


def _already_stopping(number: signal.Signals) -> None:
    log.info("already stopping", extra={"signal": number.name})
