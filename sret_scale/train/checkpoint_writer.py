"""Writes checkpoints beside the training: the loop pauses for a copy of the state, a thread does all the rest.

    loop     snapshot |------- next steps -------| snapshot ...
    thread            | gather, write, flush, rename, prune |

At most one save is under way. The fragments of the ranks come together over a process group of the threads' own, on the
CPU, so that a save and the training never wait in each other's collectives. How a save ended is known on every rank.
"""

import errno
import functools
import queue
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sret_scale.runs.checkpoint import prune_checkpoints, save_checkpoint
from sret_scale.train.distributed import Ranks, from_rank, gather_fragments, new_cpu_group
from sret_scale.train.engine.snapshot import RankTensor, Snapshot

END_S = 30.0
"""How long a run that ends with another error waits for a save: enough for a healthy disk, not for a dead peer."""


class CheckpointWriter:
    """Inside the `with`, `start` begins a save on all ranks; leaving it waits until the last one is committed."""

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int) -> None:
        self._folder, self._ranks, self._keep = folder, ranks, keep
        self._group = new_cpu_group()
        self._snapshot = Snapshot(is_main=ranks.is_main)
        self._is_reserved = False
        self._is_idle = threading.Event()
        self._is_idle.set()
        self._saves: queue.SimpleQueue[tuple[int, Mapping[str, Any]] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        # Before the steps: where memory has run out, Python 3.11 waits forever for a new thread to begin.
        threading.Thread(target=self._serve, name="checkpoint", daemon=True).start()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self.wait()
        else:
            self._is_idle.wait(timeout=END_S)
        self._saves.put(None)

    @property
    def has_failed(self) -> bool:
        """True when a save could not be made; `wait` and `start` raise its error, on every rank."""
        return self._error is not None

    def reserve(self, tensors: Iterable[RankTensor]) -> None:
        """Make the memory that saves of such tensors need, once; later calls do nothing."""
        if not self._is_reserved:
            self._is_reserved = True
            self._snapshot.reserve(tensors)

    def start(self, tensors: Iterable[RankTensor], *, step: int, state: Mapping[str, Any]) -> None:
        """Save the tensors as they are now; all ranks must call it. Raises OSError where the save before failed."""
        self.wait()
        self._snapshot.take(tensors)
        self._is_idle.clear()
        self._saves.put((step, state))

    def wait(self) -> None:
        """Returns when the save under way is committed; raises its OSError, the same on every rank."""
        self._is_idle.wait()
        if self._error:
            raise self._error

    def _serve(self) -> None:
        while save := self._saves.get():
            self._write(*save)
            self._is_idle.set()

    def _write(self, step: int, state: Mapping[str, Any]) -> None:
        try:
            tensors = self._snapshot.whole(functools.partial(gather_fragments, group=self._group))
            refusal = None
            if self._ranks.is_main:
                try:
                    save_checkpoint(self._folder, step=step, tensors=tensors, state=state)
                except OSError as error:
                    refusal = (error.errno or errno.EIO, error.strerror or str(error))
                else:
                    prune_checkpoints(self._folder, self._keep)
            refusal = from_rank(refusal, group=self._group)
            if refusal:
                self._error = OSError(*refusal)
        except Exception as error:
            # Of whatever kind: a thread that ends silently would leave a run that saves nothing any more.
            self._error = error
