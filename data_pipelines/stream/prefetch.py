"""Batches that threads fill ahead of their use.

Threads are enough, because reading, decoding and resizing release the interpreter lock. Batches stay uint8: a
fourth of the bytes of float pixels, in pinned memory where there is a GPU to copy them to.
"""

import time
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.image.batch_memory import Recycler
from data_pipelines.image.map_png import IGNORED
from data_pipelines.stream.order import Indices
from data_pipelines.stream.samples import SampleSource
from data_pipelines.stream.stalls import warn_of_stall

# Samples that a thread decodes before it takes the next piece of work.
_SAMPLES_PER_TASK = 8

# Before the name of a map in the columns of a batch.
_MAP = "map:"

# Index of a row that only fills up a batch.
PADDING = -1


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of one micro batch. In padding of evaluation `valid` is False, `indices` is -1 and the rest is zero."""

    images: Tensor  # uint8 (B, 3, H, W); of text its bytes (B, N), of pairs (B, 2, N), zeros behind the last one
    labels: Tensor  # int64 (B,)
    indices: Tensor  # int64 (B,) sample index in the shard set
    valid: Tensor  # bool (B,)
    views: Tensor  # int32 (B, 5): top, left, height, width of the box, 1 for a flip; of text what counts
    view_numbers: Tensor  # int32 (B,) which view of its sample a row shows
    # `map`: uint8 (B, H, W) labels of pixels, 255 where nothing is asked; attributes by name: int32 (B, H, W)
    maps: Mapping[str, Tensor] = field(default_factory=dict)

    def pin_memory(self) -> "Batch":
        """With what goes to a GPU in pinned memory; torch's DataLoader calls it."""
        maps = {name: map_BHW.pin_memory() for name, map_BHW in self.maps.items()}
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory(), maps=maps)

    def columns(self) -> dict[str, NDArray[Any]]:
        """As arrays that share its memory: writing one number into a tensor costs microseconds."""
        names = ("images", "labels", "indices", "view_numbers", "views")
        maps = {f"{_MAP}{name}": map_BHW.numpy() for name, map_BHW in self.maps.items()}
        return maps | {name: getattr(self, name).numpy() for name in names}


def empty_batch(
    indices_B: Indices, row_shape: tuple[int, ...], recycler: Recycler, *, pin_memory: bool, maps: Iterable[str] = ()
) -> Batch:
    """A batch for the samples `indices_B`, zero where there is none, with these maps. Its pixels are in memory of
    batches that are gone, or in pinned memory, which torch itself uses again."""
    num_rows = len(indices_B)
    shape = (num_rows, *row_shape)
    if pin_memory:
        images_BCHW = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
    else:
        images_BCHW = recycler.take(shape, torch.uint8)
    images_BCHW.numpy()[indices_B == PADDING] = 0
    return Batch(
        images=images_BCHW,
        labels=torch.zeros(num_rows, dtype=torch.int64, pin_memory=pin_memory),
        indices=torch.from_numpy(indices_B.copy()),
        valid=torch.from_numpy(indices_B != PADDING),
        views=torch.zeros(num_rows, 5, dtype=torch.int32),
        view_numbers=torch.zeros(num_rows, dtype=torch.int32),
        maps={
            name: torch.full((num_rows, *shape[2:]), fill, dtype=dtype, pin_memory=pin_memory)
            for name in maps
            for fill, dtype in [(IGNORED, torch.uint8) if name == "map" else (0, torch.int32)]
        },
    )


def fill_row(columns: Mapping[str, NDArray[Any]], row: int, source: SampleSource, epoch: int, repeat: int) -> None:
    """Fills one row of a batch, given by its columns as arrays, with the sample that its index names."""
    index = int(columns["indices"][row])
    if index == PADDING:
        return
    sample = source(epoch, index, repeat, columns["images"][row])
    columns["labels"][row], columns["indices"][row] = sample.label, sample.index
    columns["views"][row], columns["view_numbers"][row] = sample.view, sample.view_number
    for name, map_HW in sample.maps.items():
        height, width = map_HW.shape
        columns[f"{_MAP}{name}"][row, :height, :width] = map_HW


class PendingBatch:
    """A batch that is being filled."""

    def __init__(self, batch: Batch, tasks: list[Future[None]], *, stall_s: float, in_progress: object) -> None:
        self._batch, self._tasks = batch, tasks
        self._stall_s, self._in_progress = stall_s, in_progress

    def result(self) -> Batch:
        """Waits until all rows are filled, and says every `stall_s` for what. Raises here what a thread raised."""
        start = time.monotonic()
        while True:
            finished, unfinished = wait(self._tasks, timeout=self._stall_s, return_when=FIRST_EXCEPTION)
            for task in finished:
                task.result()
            if not unfinished:
                return self._batch
            warn_of_stall(time.monotonic() - start, self._in_progress)


class BatchFiller:
    """Fills batches from `source` in `num_threads` threads. Leaving the `with` cancels what has not begun and waits.

    `in_progress`, as text, is what a wait of more than `stall_s` is reported with.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        row_shape: tuple[int, ...],
        num_threads: int,
        stall_s: float,
        in_progress: object,
        maps: Iterable[str] = (),
    ) -> None:
        self._source, self._stall_s, self._in_progress = source, stall_s, in_progress
        self._row_shape, self._maps, self._recycler = row_shape, tuple(maps), Recycler()
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def submit(self, epoch: int, indices_B: Indices, repeats_B: Indices) -> PendingBatch:
        """Begins a batch of the samples `indices_B` of `epoch`, each in its `repeats_B`-th view."""
        pin_memory = torch.cuda.is_available()
        batch = empty_batch(indices_B, self._row_shape, self._recycler, pin_memory=pin_memory, maps=self._maps)
        starts = range(0, len(indices_B), _SAMPLES_PER_TASK)
        tasks = [self._executor.submit(self._fill, batch, epoch, repeats_B, start) for start in starts]
        return PendingBatch(batch, tasks, stall_s=self._stall_s, in_progress=self._in_progress)

    def _fill(self, batch: Batch, epoch: int, repeats_B: Indices, start: int) -> None:
        columns = batch.columns()
        for row in range(start, min(start + _SAMPLES_PER_TASK, len(repeats_B))):
            fill_row(columns, row, self._source, epoch, int(repeats_B[row]))

    def __enter__(self) -> "BatchFiller":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
