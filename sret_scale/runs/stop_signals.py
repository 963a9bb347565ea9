"""Which signals ask a run to save and end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""A process catches what `stop_signals` leaves of them."""


def stop_signals() -> tuple[signal.Signals, ...]:
    """STOP_SIGNALS, without SIGHUP where this process inherited it as ignored: under nohup a hang-up ends nothing."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if number != signal.SIGHUP or not is_ignored)


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
