"""Turns SIGTERM, SIGINT, SIGHUP and SIGUSR1 into a flag that the training loop looks at after every step."""

import signal
from types import FrameType

from sret_scale.runs.stop_signals import stop_signals


class StopFlag:
    """Inside the `with`, a stop signal sets `is_set`; a second Ctrl-C has its usual effect.

    Behind an orderly end they are ignored.
    Slurm sends SIGTERM to every process of a node, and the launcher's agent passes its own on: a second one is normal.
    """

    def __init__(self) -> None:
        self.is_set = False

    def __enter__(self) -> "StopFlag":
        self._previous = {number: signal.signal(number, self._handle) for number in stop_signals()}
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for number, handler in self._previous.items():
            # A signal may still be on its way, the second, or this rank's first after another's has stopped the run: it
            # must not turn the orderly end into a death by signal.
            signal.signal(number, signal.SIG_IGN if self.is_set or error is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        if number == signal.SIGINT:
            signal.signal(number, self._previous[signal.SIGINT])
