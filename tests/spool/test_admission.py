"""Watermarks and Retry-After, in virtual time and from figures; through HTTP they are in the scenarios."""

import pytest

from sidecar import settings
from sidecar.errors import Busy
from sidecar.settings import MIB
from sidecar.spool.admission import Admission, DrainRate
from sidecar.spool.work import Stats

OPTIONS = settings.Spool(cap_bytes=100 * MIB, high_watermark=0.9, low_watermark=0.8, ballast_bytes=8 * MIB)


class Hands:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.at = 0.0

    def now_us(self) -> int:
        return 0

    def monotonic(self) -> float:
        return self.at

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nobody sleeps here")


def stats(used: float, *, free: int = 1 << 40, ballast: bool = True) -> Stats:
    """Figures with so many MiB used."""
    return Stats(int(used * MIB), free, ballast, 0.001, "")


def refusal(admission: Admission, size: int = 1000) -> Busy:
    """What an append is told."""
    with pytest.raises(Busy) as raised:
        admission.enter(size)
    return raised.value


def test_the_door_closes_at_the_high_watermark_and_opens_below_the_low_one():
    """Hysteresis: between the two it stays as it was."""
    admission = Admission(OPTIONS, stats(85), Hands())
    admission.enter(1)
    admission.measured(stats(90))
    for used in (90, 85, 80.1):
        admission.measured(stats(used))
        assert refusal(admission).reason == "spool_full"
    admission.measured(stats(79.9))
    admission.enter(1)
    admission.measured(stats(89))
    admission.enter(1)


def test_the_door_closes_between_two_measurements():
    """What was let in counts at once: the first append at the high watermark closes the door for all."""
    admission = Admission(OPTIONS, stats(89), Hands())
    admission.enter(2 * MIB)
    assert refusal(admission).reason == admission.reason == "spool_full"


@pytest.mark.parametrize(
    ("used", "drained", "seconds"),
    [(95, 30, 5), (95, 0, 60), (95, 1, 60), (81, 300, 1), (82, 10, 2)],
    ids=["15 MiB at 3/s", "nothing drains", "a trickle", "at once", "2 MiB at 1/s"],
)
def test_retry_after_is_the_way_to_the_low_watermark_at_the_measured_drain(used, drained, seconds):
    """Bytes above the low watermark over bytes a second of the last ten, within 1 and 60."""
    clock = Hands()
    admission = Admission(OPTIONS, stats(95), clock)
    for second in range(10):
        clock.at = second + 20.5
        admission.drained(drained * MIB // 10)
    admission.measured(stats(used))
    assert refusal(admission).retry_after == seconds


def test_retry_after_on_a_full_disk_is_the_way_to_its_free_space():
    """10 MiB free are needed, 4 are there, 2 a second come back."""
    clock = Hands()
    admission = Admission(OPTIONS, stats(10, free=4 * MIB), clock)
    clock.at = 30.0
    admission.drained(20 * MIB)
    busy = refusal(admission)
    assert (busy.reason, busy.retry_after) == ("disk_full", 3)


def test_the_drain_is_forgotten_after_ten_seconds_and_a_young_rate_is_no_average_of_nothing():
    """A burst counts over the time it had; old bytes do not count."""
    drain = DrainRate(100.0)
    assert drain.rate(100.0) == 0.0
    drain.add(101.0, 4000)
    assert drain.rate(102.0) == 2000.0
    drain.add(105.0, 6000)
    assert drain.rate(110.0) == 1000.0
    assert drain.rate(112.0) == 600.0
    assert drain.rate(116.0) == 0.0
