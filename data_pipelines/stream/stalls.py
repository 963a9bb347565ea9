"""What is being read at this moment, and since when: so that a run which waits for data can say for which file."""

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

# More files than this are not named in one line.
_MAX_NAMED = 4


class InProgress:
    """Numbers of files with the time when each began. Safe for threads.

    `begin` and `end` are called for each sample, `name_of(file)` only for what is shown.
    """

    def __init__(self, name_of: Callable[[int], str]) -> None:
        self._name_of = name_of
        self._began: dict[int, tuple[int, float]] = {}
        self._lock = threading.Lock()
        self._next = 0

    def begin(self, file: int) -> int:
        """`file` is in progress until `end` of the number that this returns."""
        began = (file, time.monotonic())
        with self._lock:
            number = self._next = self._next + 1
            self._began[number] = began
        return number

    def end(self, number: int) -> None:
        with self._lock:
            del self._began[number]

    def __str__(self) -> str:
        """The names, the one that takes longest first, each with its seconds."""
        now = time.monotonic()
        with self._lock:
            began = sorted(self._began.values(), key=lambda entry: entry[1])
        longest: dict[int, float] = {}
        for file, start in began:
            longest.setdefault(file, now - start)
        first = list(longest.items())[:_MAX_NAMED]
        named = [f"{self._name_of(file)} (for {seconds:.0f} s)" for file, seconds in first]
        rest = len(longest) - len(named)
        return ", ".join(named) + (f" and {rest} more" if rest else "") if named else "nothing"


def warn_of_stall(waited_s: float, what: object) -> None:
    """Says in the log that the next batch is not there, and what is waited for."""
    logger.warning("waiting for the next batch for %.0f s now; in progress: %s", waited_s, what)
