"""Batches that worker processes fill ahead of their use, in memory that they share with this process.

The twin of `batches.py` for transforms that hold the interpreter lock: the same rows, errors and order.

    submit: indices into a shared batch ---pipe---> worker w: rows of the w-th part    (a name and two numbers)
    result: copy out, batch is free again <--pipe-- done, or the error; bad samples that were replaced

A worker that dies is noticed by its pipe, and named with the sample that it was at.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipelines.image.batch_memory import Recycler
from data_pipelines.stream.order import Indices
from data_pipelines.stream.prefetch import PADDING, Batch, empty_batch, fill_row
from data_pipelines.stream.processes import die_with
from data_pipelines.stream.reader import BadSampleError
from data_pipelines.stream.samples import SampleSource
from data_pipelines.stream.shared_memory import SharedBatch, SharedMemory, map_shared, shared_columns
from data_pipelines.stream.stalls import warn_of_stall

# What one worker makes of the bad samples that it met: (epoch, error).
BadSamples = list[tuple[int, BadSampleError]]
MakeSource = Callable[[BadSamples], SampleSource]


@dataclass(frozen=True)
class _Task:
    """Fill the rows `start` to before `end` of the shared batch `name` of `num_rows`."""

    name: str
    num_rows: int
    epoch: int
    start: int
    end: int


class PendingSharedBatch:
    """A batch that worker processes are filling."""

    def __init__(self, filler: "ProcessBatchFiller", batch: SharedBatch) -> None:
        self._filler, self._batch = filler, batch

    def result(self) -> Batch:
        """Waits until all rows are filled. Raises here what a worker raised, or OSError when one has died.

        Results are to be taken in the order of `submit`.
        """
        self._filler.wait()
        columns = self._batch.columns
        batch = empty_batch(columns["indices"], columns["images"].shape[-1], self._filler.recycler)
        for name in ("images", "labels", "views", "view_numbers"):
            getattr(batch, name).numpy()[:] = columns[name]
        self._filler.release(self._batch)
        return batch


class ProcessBatchFiller:
    """Fills batches in `num_workers` processes. Leaving the `with` ends them, whatever they are doing.

    `make_source(bad_samples)` is called once in each process, so it must be picklable, and its source reports bad
    samples there; `on_bad_sample` hears of them in this process. `name_of(index)` is what a message calls the sample
    that a process stands still at, or died of.
    """

    def __init__(
        self,
        make_source: MakeSource,
        *,
        image_size: int,
        num_workers: int,
        stall_s: float,
        on_bad_sample: Callable[[int, BadSampleError], None],
        name_of: Callable[[int], str],
    ) -> None:
        self._image_size, self._stall_s = image_size, stall_s
        self._on_bad_sample, self._name_of = on_bad_sample, name_of
        self.recycler = Recycler()
        # The sample that each process is at.
        self._places = SharedMemory(num_workers * 8)
        self._samples = np.frombuffer(self._places.map, np.int64)
        self._samples[:] = PADDING
        self._free: list[SharedBatch] = []
        self._all: list[SharedBatch] = []
        # Not forked: the caller has threads (torch), and a fork of those can hang.
        context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[BaseProcess, Connection]] = []
        for number in range(num_workers):
            ours, theirs = context.Pipe()
            arguments = (os.getpid(), theirs, make_source, image_size, (self._places.name, number))
            process = context.Process(target=_work, args=arguments, name=f"data-worker-{number}", daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def submit(self, epoch: int, indices_B: Indices, repeats_B: Indices) -> PendingSharedBatch:
        """Begins a batch of the samples `indices_B` of `epoch`, each in its `repeats_B`-th view."""
        num_rows = len(indices_B)
        batch = self._take(num_rows)
        batch.columns["indices"][:], batch.columns["repeats"][:] = indices_B, repeats_B
        for number, (_, pipe) in enumerate(self._workers):
            start, end = (num_rows * part // len(self._workers) for part in (number, number + 1))
            try:
                pipe.send(_Task(batch.name, num_rows, epoch, start, end))
            except (BrokenPipeError, ConnectionResetError) as error:
                raise self._death(number) from error
        return PendingSharedBatch(self, batch)

    def _take(self, num_rows: int) -> SharedBatch:
        for batch in self._free:
            if batch.num_rows == num_rows:
                self._free.remove(batch)
                return batch
        batch = SharedBatch(num_rows, self._image_size)
        self._all.append(batch)
        return batch

    def wait(self) -> None:
        """Waits for the next answer of every worker."""
        answers = []
        for number, (_, pipe) in enumerate(self._workers):
            start = time.monotonic()
            try:
                while not pipe.poll(self._stall_s):
                    warn_of_stall(time.monotonic() - start, self._worker_name(number))
                answers.append(pipe.recv())
            except (EOFError, ConnectionResetError) as error:
                raise self._death(number) from error
        for bad_samples, _ in answers:
            for epoch, bad_sample in bad_samples:
                self._on_bad_sample(epoch, bad_sample)
        for _, failure in answers:
            if failure is not None:
                raise failure

    def release(self, batch: SharedBatch) -> None:
        self._free.append(batch)

    def __enter__(self) -> "ProcessBatchFiller":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        for batch in self._all:
            batch.close()
        self._places.close()

    def _worker_name(self, number: int) -> str:
        """A process, and the sample that it is at."""
        process, index = self._workers[number][0], int(self._samples[number])
        place = "between two samples" if index == PADDING else f"at {self._name_of(index)}"
        return f"{process.name} (process {process.pid}), {place}"

    def _death(self, number: int) -> OSError:
        process = self._workers[number][0]
        process.join()
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        advice = "; out of memory? Lower data.workers or data.prefetch_batches" if code == -signal.SIGKILL else ""
        return OSError(f"{self._worker_name(number)}: the process, which reads and transforms samples, {how}{advice}")


def _work(parent: int, pipe: Connection, make_source: MakeSource, image_size: int, place: tuple[str, int]) -> None:
    """Fills rows until the parent closes the pipe, or dies. `place` is the name and cell of where it says at which."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(parent)
    torch.set_num_threads(1)
    bad_samples: BadSamples = []
    failure: Exception | None = None
    try:
        source = make_source(bad_samples)
    except Exception as error:
        # It goes to the parent, as the answer to every task.
        failure = error
    samples, number = np.frombuffer(map_shared(place[0]), np.int64), place[1]
    batches: dict[str, dict[str, NDArray[Any]]] = {}
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            os._exit(0)
        if task.name not in batches:
            batches[task.name] = shared_columns(map_shared(task.name), task.num_rows, image_size)
        if failure is None:
            failure = _fill(source, batches[task.name], task, samples[number : number + 1])
        pipe.send((bad_samples, failure))
        bad_samples.clear()


def _fill(
    source: SampleSource, columns: dict[str, NDArray[Any]], task: _Task, sample: NDArray[np.int64]
) -> Exception | None:
    """Fills the rows of a task, and says in `sample` at which it is; the error that ended it."""
    columns["view_numbers"][task.start : task.end] = 0
    for row in range(task.start, task.end):
        sample[0] = columns["indices"][row]
        try:
            fill_row(columns, row, source, task.epoch, int(columns["repeats"][row]))
        except Exception as error:
            # Any error of a sample is the run's: it is raised in the parent.
            return error
    sample[0] = PADDING
    return None
