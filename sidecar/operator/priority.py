"""The priority of long work that a person starts beside a live sidecar: it runs when nobody else wants the CPU.

``kubectl exec ... sidecar backfill`` shares its container's cores with the process that answers the application. So
these commands ask the kernel to be *idle* work: whatever is awake beside them runs at once, and they use what is left.
That covers their own disk accesses too, because the kernel takes the class of those from it. Between pods, and between
services of a host, nothing changes: there the shares of the control groups decide, not the priority within one.

FAILURE: a kernel or a profile that knows no idle class leaves the lowest niceness; one that refuses that too leaves the
command as it was. Neither is a reason not to do the work. The way back is a new process: nobody may raise himself.
"""

import contextlib
import os
from typing import Final

from sidecar.errors import ConfigError

_LOWEST: Final = 19  # niceness
PRIORITIES: Final = ("low", "normal")
VARIABLE: Final = "SIDECAR_PRIORITY"  # where the command line says nothing


def take(priority: str) -> None:
    """``low``: give way to everybody from now on; ``normal``: stay as it was started.

    Call it before threads are started: they inherit it. Raises ConfigError for any other word, which is the variable's.
    """
    if priority not in PRIORITIES:
        raise ConfigError(VARIABLE, seen=priority, allowed=" or ".join(PRIORITIES))
    if priority == "normal":
        return
    with contextlib.suppress(OSError):
        os.nice(_LOWEST)
    with contextlib.suppress(OSError, AttributeError):  # not Linux; not allowed
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
