"""What happens to a bad sample in training: it is counted, recorded, and stops the run when there are too many."""

import json
import logging
import os
import threading
from pathlib import Path

from data_pipelines.reader import BadSampleError

logger = logging.getLogger(__name__)


class TooManyBadSamplesError(ValueError):
    """The share of bad samples is above the configured limit."""


class Quarantine:
    """Counts the bad samples of one rank and appends each to a file of JSON lines (shard, key, offset, reason).

    The limit is a share of `samples_per_epoch`, counted anew in every epoch (and after a restart). Safe for
    threads; ranks may share the file, as each line is written by one call to a file that is open for appending.
    """

    def __init__(self, file: str | None, *, max_bad_rate: float, samples_per_epoch: int) -> None:
        self._recorded: set[int] = set()
        self._file = Path(file) if file else None
        self._max_bad_rate = max_bad_rate
        self._samples_per_epoch = samples_per_epoch
        self._bad_of_epoch: dict[int, set[int]] = {}
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Different bad samples met so far."""
        return len(self._recorded)

    def add(self, epoch: int, error: BadSampleError) -> None:
        """Records one; raises TooManyBadSamplesError above the limit."""
        with self._lock:
            bad = self._bad_of_epoch.setdefault(epoch, set())
            bad.add(error.index)
            num_bad = len(bad)
            is_new = error.index not in self._recorded
            self._recorded.add(error.index)
            if is_new and self._file is not None:
                self._append(self._file, error)
        if is_new:
            logger.warning("bad sample replaced by another: %s", error)
        if num_bad > self._max_bad_rate * self._samples_per_epoch:
            raise TooManyBadSamplesError(
                f"{num_bad} bad samples in epoch {epoch}, more than data.max_bad_rate {self._max_bad_rate:g} "
                f"of this rank's {self._samples_per_epoch} samples; the last: {error}"
            ) from error

    @staticmethod
    def _append(file: Path, error: BadSampleError) -> None:
        fields = {"shard": error.shard, "key": error.key, "offset": error.offset, "reason": error.reason}
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, json.dumps(fields).encode() + b"\n")
        finally:
            os.close(descriptor)
