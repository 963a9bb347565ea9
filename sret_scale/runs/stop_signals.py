"""Which signals ask a run to save and end."""

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""A process catches what `stop_signals` leaves of them."""


def stop_signals() -> tuple[signal.Signals, ...]:
    """STOP_SIGNALS, without SIGHUP where this process inherited it as ignored: under nohup a hang-up ends nothing."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if number != signal.SIGHUP or not is_ignored)
