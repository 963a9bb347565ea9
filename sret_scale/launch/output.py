"""Output that nobody takes: the reader has left, the terminal is gone, a log's disk is full, a stream was closed.

None of this ends work whose product is in files: what it prints from then on goes to another file, or nowhere.
"""

import io
import os
import sys
from pathlib import Path
from typing import Any, Literal


class _Lasting(io.FileIO):
    """A descriptor for writing; when it refuses a write, the file `instead` takes its place."""

    def __init__(self, descriptor: int, instead: str | Path) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._instead = instead

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            os.dup2(os.open(self._instead, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), self.fileno())
            return super().write(data)


def outlast(name: Literal["stdout", "stderr"], instead: str | Path = os.devnull) -> None:
    """From now on what is printed to `name` goes to the file `instead` where it cannot be written."""
    stream = getattr(sys, name)
    raw = io.BufferedWriter(_Lasting(stream.fileno(), instead))
    setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True))


def open_missing_streams() -> None:
    """Gives stdin, stdout and stderr where they are closed: else the next file that is opened would be taken for one.

    Reads find the end, and writes fail as on a closed one.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDONLY), number)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
