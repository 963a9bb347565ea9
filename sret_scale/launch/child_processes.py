"""How a process that starts others ends: signals reach it alone, and nothing it started outlives it.

The kernel ends a child when its parent dies (Linux, prctl(2)).
"""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sret_scale.runs.stop_signals import stop_signals

_PR_SET_PDEATHSIG = 1
# Loaded at import: the function is also called between fork and exec, where loading a library is not safe.
_LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """From now on this process is killed when its parent ends, even by SIGKILL; raises OSError if that is refused.

    The parent is the thread that started this process, so start processes that call this from a main thread.
    """
    parent = os.getppid()
    if _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) was refused")
    if os.getppid() != parent:
        # The parent died before the request, so no signal will come.
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """The stop signals that come inside the `with`, as a list that grows; what they did before is restored after it."""
    requests: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        # Of one terminal that goes, the kernel and the shell tell each: a hang-up is never the second, urgent request.
        if number != signal.SIGHUP or not requests:
            requests.append(number)

    before = {number: signal.signal(number, on_signal) for number in stop_signals()}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
