"""How much is sampled: less when the other store is in trouble, more again when it is not. Pure; time passed in."""

from typing import Final

_LEAST: Final = 1 / 1024
_RECOVERY: Final = 30.0  # seconds without trouble that double the share again


class Pace:
    """A share of what the settings allow, between 1/1024 and 1."""

    def __init__(self) -> None:
        self.share = 1.0
        self._since = 0.0

    def trouble(self, now: float) -> None:
        """The other store failed, throttled or was slow: half as many from now on."""
        self.share = max(_LEAST, self.share / 2)
        self._since = now

    def calm(self, now: float) -> None:
        """It answered well; after a while of this, twice as many."""
        if self.share < 1 and now - self._since >= _RECOVERY:
            self.share = min(1.0, self.share * 2)
            self._since = now
