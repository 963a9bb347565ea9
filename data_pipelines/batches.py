"""Batches that threads fill ahead of their use.

Threads are enough, because reading, decoding and resizing release the interpreter lock. Batches stay uint8: a
fourth of the bytes of float pixels, in pinned memory where there is a GPU to copy them to.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from data_pipelines.order import Indices
from data_pipelines.samples import SampleSource

# Samples that a thread decodes before it takes the next piece of work.
_SAMPLES_PER_TASK = 8

# Index of a row that only fills up a batch.
PADDING = -1


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of one micro batch. In padding of evaluation `valid` is False, `indices` is -1 and the rest is zero."""

    images: Tensor  # uint8 (B, 3, H, W)
    labels: Tensor  # int64 (B,)
    indices: Tensor  # int64 (B,) sample index in the shard set
    valid: Tensor  # bool (B,)
    views: Tensor  # int32 (B, 5): top, left, height, width of the box, 1 for a flip
    view_numbers: Tensor  # int32 (B,) which view of its sample a row shows


class PendingBatch:
    """A batch that is being filled."""

    def __init__(self, batch: Batch, tasks: list[Future[None]]) -> None:
        self._batch, self._tasks = batch, tasks

    def result(self) -> Batch:
        """Waits until all rows are filled. Raises here what a thread raised."""
        for task in self._tasks:
            task.result()
        return self._batch


class BatchFiller:
    """Fills batches from `source` in `num_threads` threads. Leaving the `with` cancels what has not begun and waits."""

    def __init__(self, source: SampleSource, *, image_size: int, num_threads: int) -> None:
        self._source = source
        self._image_size = image_size
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._pin_memory = torch.cuda.is_available()

    def submit(self, epoch: int, indices_B: Indices, repeats_B: Indices) -> PendingBatch:
        """Begins a batch of the samples `indices_B` of `epoch`, each in its `repeats_B`-th view."""
        num_rows = len(indices_B)
        size = self._image_size
        batch = Batch(
            images=torch.zeros(num_rows, 3, size, size, dtype=torch.uint8, pin_memory=self._pin_memory),
            labels=torch.zeros(num_rows, dtype=torch.int64, pin_memory=self._pin_memory),
            indices=torch.from_numpy(indices_B.copy()),
            valid=torch.from_numpy(indices_B != PADDING),
            views=torch.zeros(num_rows, 5, dtype=torch.int32),
            view_numbers=torch.zeros(num_rows, dtype=torch.int32),
        )
        starts = range(0, num_rows, _SAMPLES_PER_TASK)
        tasks = [self._executor.submit(self._fill, batch, epoch, repeats_B, start) for start in starts]
        return PendingBatch(batch, tasks)

    def _fill(self, batch: Batch, epoch: int, repeats_B: Indices, start: int) -> None:
        # Through numpy, because writing one number into a tensor costs microseconds.
        labels_B, indices_B, numbers_B = batch.labels.numpy(), batch.indices.numpy(), batch.view_numbers.numpy()
        views_B5 = batch.views.numpy()
        for row in range(start, min(start + _SAMPLES_PER_TASK, len(indices_B))):
            if indices_B[row] == PADDING:
                continue
            sample = self._source(epoch, int(indices_B[row]), int(repeats_B[row]))
            batch.images[row] = sample.pixels
            labels_B[row], indices_B[row], numbers_B[row] = sample.label, sample.index, sample.view_number
            views_B5[row] = sample.view

    def __enter__(self) -> "BatchFiller":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
