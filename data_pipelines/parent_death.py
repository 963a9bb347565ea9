"""Processes that never outlive who started them: the kernel ends a child when its parent dies (Linux, prctl(2))."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
# Loaded at import: the function is also called between fork and exec, where loading a library is not safe.
_LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int | None = None) -> None:
    """From now on this process is killed when its parent ends, even by SIGKILL; raises OSError if that is refused.

    The parent is the thread that started this process, so start processes that call this from a main thread.
    """
    parent = os.getppid() if parent is None else parent
    if _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) was refused")
    if os.getppid() != parent:
        # The parent died before the request, so no signal will come.
        os.kill(os.getpid(), signal.SIGKILL)
