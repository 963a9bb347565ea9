"""Worker processes that never outlive their command."""

import ctypes
import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import SpawnContext
from typing import Any

# Linux: prctl(PR_SET_PDEATHSIG, ...) has the kernel send a signal when the parent dies.
_PR_SET_PDEATHSIG = 1

# Not forked: the caller may have threads (torch), and a fork of those can hang.
CONTEXT: SpawnContext = multiprocessing.get_context("spawn")


def worker_pool(num_workers: int, keep: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """A pool whose processes call `keep(*arguments)` first, ignore Ctrl-C (the command hears it) and die with it."""
    return ProcessPoolExecutor(num_workers, mp_context=CONTEXT, initializer=_start, initargs=(keep, arguments))


def _start(keep: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    keep(*arguments)
