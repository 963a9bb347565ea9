"""Error records of ranks, one small JSON file each in the run folder, so that the first error can be shown last.

When one rank fails, its peers fail after it with less telling messages (a closed connection). The time decides. How an
error is worded for people is here too, because ranks, nodes and the command say it alike.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from data_pipelines.atomic_files import write_whole
from data_pipelines.checked_files import printable, read_checked


@dataclass(frozen=True, kw_only=True)
class RankError:
    """Why one rank ended; `rank` is -1 when a whole node was lost."""

    time_s: Annotated[float, Field(allow_inf_nan=False)]
    """Seconds since 1970: of the exception, or of the last moment when the rank was seen alive."""
    rank: int
    host: str
    message: str
    exit_code: Annotated[int, Field(gt=0, lt=256)]
    trace: str = ""


def log_path(run_folder: Path, rank: int) -> Path:
    """Where a rank's output goes (of rank 0 only what it writes to stderr)."""
    return run_folder / "logs" / f"rank-{rank:05d}.log"


def write_error(run_folder: Path, error: RankError) -> None:
    """Leaves the record, unless that rank has one already: its first is the reason."""
    name = f"rank-{error.rank:05d}.json" if error.rank >= 0 else f"host-{error.host}.json"
    path = run_folder / "errors" / name
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(asdict(error)))


def has_error(run_folder: Path, rank: int) -> bool:
    """True when that rank has left a record."""
    return (run_folder / "errors" / f"rank-{rank:05d}.json").exists()


def clear_errors(run_folder: Path) -> None:
    """Removes the records of an earlier start."""
    for path in (run_folder / "errors").glob("*.json"):
        path.unlink(missing_ok=True)


def first_error(run_folder: Path) -> RankError | None:
    """The earliest record, or None."""
    records = [_read(path) for path in sorted((run_folder / "errors").glob("*.json"))]
    return min(records, key=lambda record: record.time_s, default=None)


def show_first_error(run_folder: Path, error: RankError) -> Iterator[str]:
    """Lines for the terminal; the last one is the message itself."""
    if error.rank >= 0:
        log = log_path(run_folder, error.rank)
        trace = error.trace
        if not trace and error.exit_code != 2:
            with contextlib.suppress(FileNotFoundError):
                # A crash below Python leaves its words only there.
                trace = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        if trace:
            yield printable(trace.rstrip())
        yield printable(f"first error: rank {error.rank} on {error.host} (its log: {log})")
    yield f"error: {printable(error.message)}"


def _read(path: Path) -> RankError:
    try:
        return read_checked(path, RankError)
    except ValueError as error:
        # Better than none: that there was an error, and where its record is.
        return RankError(time_s=math.inf, rank=-1, host="", message=str(error), exit_code=1)


MOST_CHARACTERS = 2000


def counted(number: int, noun: str) -> str:
    """The number with its noun: `1 rank`, `2 ranks`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def in_words(error: BaseException) -> str:
    """What an exception says, an operating system's refusal without its number: `FILE: No such file or directory`.

    A screen of it at most: a file may hold a name of megabytes.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if len(text) > MOST_CHARACTERS:
        text = f"{text[: MOST_CHARACTERS // 2]} [...] {text[-MOST_CHARACTERS // 2 :]}"
    return printable(text)


def now_s() -> float:
    """Seconds since 1970; the clocks of nodes must agree to well under a second for the order to be right."""
    return time.time()
