"""A shard set as a `webdataset.DataPipeline`, for any trainer that takes one: our order, exact resume and checks.

    pipeline = to_webdataset(shards, batch_size=32, state=state).compose(
        webdataset.decode("pil"), webdataset.to_tuple("jpg;png", "cls", "__state__"), webdataset.batched(32)
    )
    for images, labels, states in webdataset.WebLoader(pipeline, batch_size=None, num_workers=4): ...

Every sample has `__state__`: what `state` must be to go on behind its batch. Worker w of W makes batches w, w + W, ...,
which a loader takes in turn, so that the order is that of one process.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import webdataset

from data_pipelines.config import DataConfig
from data_pipelines.remote.shard_sets import address_of
from data_pipelines.shards.index import ShardSet
from data_pipelines.stream.loader import LoaderState, TrainingSource, TrainLoader, check_views
from data_pipelines.stream.reader import ShardReader
from data_pipelines.stream.samples import TrainingSamples
from data_pipelines.text.pieces import TARGET


def to_webdataset(
    shards: ShardSet,
    config: DataConfig | None = None,
    *,
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    image_size: int | None = None,
    state: str | None = None,
) -> webdataset.DataPipeline:
    """The samples of one rank without end, batch by batch of the order, from the beginning or from `state`.

    A sample has `__key__`, `__url__`, `__state__`, `cls`, and the bytes of its image under the ending that fits them,
    for webdataset's own stages to decode; with `image_size`, `cls` is a number and `image` the drawn view, uint8
    (3, size, size). Each sample's checksum is checked: a bad one is BadSampleError, or with `image_size` replaced as in
    training. `batch_size` is that of `webdataset.batched` behind it. Raises ValueError for a state of another order,
    and for views that would part an image from its label map.
    """
    config = config or DataConfig()
    loader = TrainLoader(shards, config, micro_batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
    start = LoaderState() if state is None else LoaderState.from_json(state)
    loader.check(start)
    if image_size is not None:
        check_views(shards, config, image_size)
    return webdataset.DataPipeline(_Samples(shards, config, loader, start, image_size))


class _Samples(torch.utils.data.IterableDataset[dict[str, Any]]):
    def __init__(
        self, shards: ShardSet, config: DataConfig, loader: TrainLoader, start: LoaderState, image_size: int | None
    ) -> None:
        self._shards, self._config, self._loader = shards, config, loader
        self._start, self._image_size = start, image_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        with ExitStack() as stack:
            reader = stack.enter_context(ShardReader(self._shards))
            source = TrainingSource(self._shards, self._config, self._loader.order.seed)
            views = source.over(reader, self._loader.quarantine.add)
            for step, (micro_batches, after) in enumerate(self._loader.tasks(self._start, stack)):
                if step % count == number:
                    state = after.to_json()
                    epoch, indices_B, repeats_B = micro_batches[0]
                    for index, repeat in zip(indices_B.tolist(), repeats_B.tolist(), strict=True):
                        yield self._sample(reader, views, epoch, index, repeat) | {"__state__": state}

    def _sample(
        self, reader: ShardReader, views: TrainingSamples, epoch: int, index: int, repeat: int
    ) -> dict[str, Any]:
        if self._image_size is None:
            image = reader.read(index)
            found = "source" if self._shards.is_pairs else "txt" if self._shards.is_text else "img"
            ending = next((name for head, name in _ENDINGS.items() if image.startswith(head)), found)
            content: dict[str, Any] = {ending: image, "cls": str(int(self._shards.label[index])).encode()}
            if self._shards.is_pairs:
                content[TARGET] = reader.read(index, TARGET)
        else:
            pixels_CHW = np.empty((3, self._image_size, self._image_size), np.uint8)
            sample = views(epoch, index, repeat, pixels_CHW)
            index, content = sample.index, {"image": torch.from_numpy(pixels_CHW), "cls": sample.label}
        url = address_of(self._shards, int(self._shards.shard_of[index]))
        return {"__key__": self._shards.key(index), "__url__": url, **content}


# How a file begins -> the ending by which webdataset knows it.
_ENDINGS = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}
_ENDINGS |= {b"II*": "tif", b"MM": "tif"}
