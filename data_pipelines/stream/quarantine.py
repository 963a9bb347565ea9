"""What happens to a bad sample in training: it is counted, recorded, and stops the run when there are too many."""

import json
import logging
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from data_pipelines.checked_files import parse_checked, read_bounded
from data_pipelines.stream.reader import BadSampleError

logger = logging.getLogger(__name__)


_MAX_BYTES = 1 << 28
_Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Line(TypedDict):
    index: _Count
    epoch: _Count
    rank: _Count
    world_size: _Count


class TooManyBadSamplesError(ValueError):
    """The share of bad samples is above the configured limit."""


class Quarantine:
    """Counts the bad samples of one rank and appends each, once an epoch, to a file of JSON lines (shard, key, reason).

    The limit is a share of `samples_per_epoch`, counted anew in every epoch. A restarted run counts on from its file;
    what another number of ranks found in the same epoch is shared out equally. Safe for threads; ranks may share the
    file, as each line is written by one call to a file that is open for appending.
    """

    def __init__(
        self, file: str | None, *, max_bad_rate: float, samples_per_epoch: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self._file = Path(file) if file else None
        self._max_bad_rate, self._samples_per_epoch = max_bad_rate, samples_per_epoch
        self._rank, self._world_size = rank, world_size
        self._known: set[int] = set()
        self._bad_of_epoch: dict[int, set[int]] = {}
        self._found_by_others: Counter[int] = Counter()
        self._lock = threading.Lock()
        if self._file is not None and self._file.exists():
            self._count_on(self._file)

    @property
    def count(self) -> int:
        """Different bad samples that this rank has met so far."""
        return len(self._known)

    def add(self, epoch: int, error: BadSampleError) -> None:
        """Records one; raises TooManyBadSamplesError above the limit."""
        with self._lock:
            bad = self._bad_of_epoch.setdefault(epoch, set())
            if error.index not in bad and self._file is not None:
                self._append(self._file, epoch, error)
            bad.add(error.index)
            num_bad = len(bad) + -(-self._found_by_others[epoch] // self._world_size)
            is_new = error.index not in self._known
            self._known.add(error.index)
        if is_new:
            logger.warning("bad sample replaced by another: %s", error)
        if num_bad > self._max_bad_rate * self._samples_per_epoch:
            raise TooManyBadSamplesError(
                f"{num_bad} bad samples in epoch {epoch}, more than data.max_bad_rate {self._max_bad_rate:g} "
                f"of this rank's {self._samples_per_epoch} samples; the last: {error}. Look at the set with "
                "`sret-scale shards verify`, or raise the limit"
            ) from error

    def _count_on(self, file: Path) -> None:
        for number, line in enumerate(read_bounded(file, _MAX_BYTES).splitlines(), 1):
            try:
                found = parse_checked(line, _Line, f"{file} line {number}")
            except ValueError as error:
                # What a killed process was writing, or a disk lost: its sample will be met again.
                if line.strip():
                    logger.warning("left out: %s", error)
                continue
            if found["world_size"] != self._world_size:
                self._found_by_others[found["epoch"]] += 1
            elif found["rank"] == self._rank:
                self._bad_of_epoch.setdefault(found["epoch"], set()).add(found["index"])
                self._known.add(found["index"])

    def _append(self, file: Path, epoch: int, error: BadSampleError) -> None:
        fields = {
            **{"shard": error.shard, "key": error.key, "offset": error.offset, "reason": error.reason},
            **{"index": error.index, "epoch": epoch, "rank": self._rank, "world_size": self._world_size},
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, b"\n" * is_torn + json.dumps(fields).encode() + b"\n")
        finally:
            os.close(descriptor)
