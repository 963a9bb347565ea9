"""What is being read at this moment, and since when: so that a run which waits for data can say for which file."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

# More files than this are not named in one line.
_MAX_NAMED = 4


class InProgress:
    """Names with the time when each began. Safe for threads."""

    def __init__(self) -> None:
        self._began: dict[int, tuple[str, float]] = {}
        self._lock = threading.Lock()
        self._next = 0

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """`name` is in progress until the `with` is left."""
        with self._lock:
            number = self._next = self._next + 1
            self._began[number] = (name, time.monotonic())
        try:
            yield
        finally:
            with self._lock:
                del self._began[number]

    def __str__(self) -> str:
        """The names, the one that takes longest first, each with its seconds."""
        now = time.monotonic()
        with self._lock:
            began = sorted(self._began.values(), key=lambda entry: entry[1])
        longest: dict[str, float] = {}
        for name, start in began:
            longest.setdefault(name, now - start)
        named = [f"{name} (for {seconds:.0f} s)" for name, seconds in list(longest.items())[:_MAX_NAMED]]
        rest = len(longest) - len(named)
        return ", ".join(named) + (f" and {rest} more" if rest else "") if named else "nothing"


def warn_of_stall(waited_s: float, what: object) -> None:
    """Says in the log that the next batch is not there, and what is waited for."""
    logger.warning("the next batch has been waited for %.0f s; in progress: %s", waited_s, what)
