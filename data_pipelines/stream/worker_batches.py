"""Batches that worker processes fill ahead of their use: torch's DataLoader over the order.

The twin of `prefetch.py` for transforms that hold the interpreter lock: the same rows, errors and order. A worker fills
a whole micro batch, which comes through shared memory (/dev/shm).
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from data_pipelines.image.batch_memory import Recycler
from data_pipelines.parent_death import die_with_parent
from data_pipelines.stream.order import Indices
from data_pipelines.stream.prefetch import PADDING, Batch, empty_batch, fill_row
from data_pipelines.stream.reader import BadSampleError
from data_pipelines.stream.samples import SampleSource
from data_pipelines.stream.stalls import warn_of_stall

Task = tuple[int, Indices, Indices]
"""Epoch, samples (B,) and which view of each (B,) of a micro batch."""
# What one worker makes of the bad samples that it met: (epoch, error).
BadSamples = list[tuple[int, BadSampleError]]
MakeSource = Callable[[BadSamples], SampleSource]
Answer = tuple[Batch, BadSamples, Exception | None]

_LOOK_EVERY_S = 5.0
"""How soon it is noticed that a worker has died."""
_ADVICE = {
    -signal.SIGKILL: "; out of memory? Lower data.workers or data.prefetch_batches",
    -signal.SIGBUS: "; is /dev/shm full? Enlarge it, or lower data.workers or data.prefetch_batches",
}


class _Batches(Dataset[Answer]):
    """The batch of a task, as a worker fills it."""

    def __init__(
        self, make_source: MakeSource, row_shape: tuple[int, ...], maps: Sequence[str], num_workers: int
    ) -> None:
        self._make_source, self._row_shape, self._maps = make_source, row_shape, maps
        self._source: SampleSource | None = None
        self._bad_samples: BadSamples = []
        self._recycler = Recycler()
        # (process, sample that it is at) of each worker, in memory that all of them see.
        self.places = torch.full((num_workers, 2), PADDING).share_memory_()  # type: ignore[no-untyped-call]  # torch

    def __getitem__(self, task: Task) -> Answer:
        epoch, indices_B, repeats_B = task
        place = self.places[get_worker_info().id].numpy()  # type: ignore[union-attr]  # we are in a worker
        batch = empty_batch(indices_B, self._row_shape, self._recycler, pin_memory=False, maps=self._maps)
        columns, failure = batch.columns(), None
        try:
            if self._source is None:
                self._source = self._make_source(self._bad_samples)
            for row in range(len(indices_B)):
                place[:] = os.getpid(), indices_B[row]
                fill_row(columns, row, self._source, epoch, int(repeats_B[row]))
        except Exception as error:
            # Any error of a sample is the run's: it is raised in the parent.
            failure = error
        place[1] = PADDING
        found = self._bad_samples.copy()
        self._bad_samples.clear()
        return batch, found, failure


def worker_batches(
    make_source: MakeSource,
    tasks: Iterable[Task],
    *,
    row_shape: tuple[int, ...],
    maps: Sequence[str] = (),
    num_workers: int,
    prefetch_batches: int,
    stall_s: float,
    on_bad_sample: Callable[[int, BadSampleError], None],
    name_of: Callable[[int], str],
) -> Generator[Batch]:
    """The batches of `tasks`, in their order. Raises here what a worker raised, or OSError when one has died.

    `make_source(bad_samples)` is called once in each process, so it must be picklable, and its source reports bad
    samples there; `on_bad_sample` hears of them in this process. `name_of(index)` is what a message calls the sample
    that a process stands still at, or died of. Closing the generator ends the processes.
    """
    batches = _Batches(make_source, row_shape, maps, num_workers)
    others, handler = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=tasks,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        timeout=min(stall_s, _LOOK_EVERY_S),
        worker_init_fn=partial(_begin, os.getpid()),
        # Not forked: the caller has threads (torch), and a fork of those can hang.
        multiprocessing_context="spawn",
        # Without one of its own it would draw a seed, which nothing here uses, from the global generator.
        generator=torch.Generator(),
        prefetch_factor=max(1, -(-prefetch_batches // num_workers)),
    )
    answers = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch's handler raises the death of a worker wherever this process is; here it is raised where a batch is due.
        signal.signal(signal.SIGCHLD, handler)
    workers = {process.pid: process for process in multiprocessing.active_children() if process not in others}
    try:
        while (answer := _next(answers, stall_s, workers, batches.places, name_of)) is not None:
            batch, bad_samples, failure = answer
            for epoch, bad_sample in bad_samples:
                on_bad_sample(epoch, bad_sample)
            if failure is not None:
                raise failure
            yield batch
    finally:
        # torch ends them with its iterator, which lives as long as an error that refers to it.
        _keep_from_cleaning_up(answers)
        for process in workers.values():
            process.kill()
            process.join()


def _keep_from_cleaning_up(answers: Any) -> None:
    """Tell torch's iterator that its workers are ended, and let go of what it would have let go of.

    A process that is killed may hold the lock of torch's event for the end, for ever. torch's own clean-up waits for
    that lock wherever the garbage collector runs it: seen in a thread that was about to begin, and never did.
    """
    answers._shutdown = True
    # torch knows workers by their iterator's address: a later iterator at the same one would be refused.
    signal_handling._remove_worker_pids(id(answers))  # type: ignore[attr-defined]  # not in its list of exports
    answers._worker_pids_set = False
    if done := getattr(answers, "_pin_memory_thread_done_event", None):
        done.set()
    for queue in answers._index_queues:
        queue.cancel_join_thread()
        queue.close()


def _next(
    answers: "Iterable[Answer]",
    stall_s: float,
    workers: dict[int | None, BaseProcess],
    places: torch.Tensor,
    name_of: Callable[[int], str],
) -> Answer | None:
    """The next answer, None at the end; says in the log every `stall_s` what is waited for."""
    began_s, num_said = time.monotonic(), 0

    def at(pid: int | None) -> str:
        index = next((index for number, index in places.tolist() if number == pid), PADDING)
        return f"data worker (process {pid}), {'between two samples' if index == PADDING else f'at {name_of(index)}'}"

    while True:
        try:
            return next(answers, None)  # type: ignore[call-overload]  # torch's iterator has no public type
        except RuntimeError as error:
            ended = {pid: process.exitcode for pid, process in workers.items() if process.exitcode is not None}
            for pid, code in ended.items():
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
                message = f"{at(pid)}: the process, which reads and transforms samples, {how}{_ADVICE.get(code, '')}"
                raise OSError(message) from error
            if "timed out" not in str(error):
                raise
            if (waited_s := time.monotonic() - began_s) >= stall_s * (num_said + 1):
                num_said += 1
                warn_of_stall(waited_s, ", ".join(map(at, workers)))


def _begin(parent: int, _worker: int) -> None:
    """The start of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)
