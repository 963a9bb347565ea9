"""How fast a shard set is read here: tars front to back, samples at random, decoded, cut to views, and by the loader.

    sequential   the bytes of the tars, as a streaming reader takes them
    random       index, pread and checksum of single samples, in a shuffled order
    decode       the same, and all pixels decoded
    view         the same, but only the drawn view decoded, as training does
    loader       batches of one rank, with its threads

Each stage but the last uses one thread, so that the slow one shows. What lies in memory reads faster than any disk: the
first stage of a set that was not read lately, or `cold`, shows the disk.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.image.decode import decode_rgb, decode_view
from data_pipelines.image.pillow_door import BadImageError
from data_pipelines.image.view import draw_view
from data_pipelines.keyed_random import keyed_permutation
from data_pipelines.shards.index import ShardSet, open_shards
from data_pipelines.stream.loader import LoaderState, TrainLoader
from data_pipelines.stream.reader import BadSampleError, ShardReader

_CHUNK_BYTES = 4 << 20
_MICRO_BATCH_SIZE = 64

# Images and bytes of one piece of work after the other.
Pieces = Iterator[tuple[float, int]]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a stage did in `seconds`; bytes are those of the images, for `sequential` those of the tars."""

    stage: str
    images: float
    bytes: int
    seconds: float

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / self.seconds


def measure_speed(
    folder: str | Path, *, seconds: float, image_size: int, num_threads: int, cold: bool
) -> Iterator[Speed]:
    """The speed of each stage, one after the other, each measured for about `seconds`.

    `cold` drops the tars from the page cache before each stage, as far as the kernel follows. Raises ValueError or
    OSError for what is no sound shard set or holds a bad sample.
    """
    if seconds <= 0 or image_size < 1 or num_threads < 1:
        raise ValueError(
            f"expected seconds, image size and threads above 0, got {seconds}, {image_size}, {num_threads}"
        )
    shards = open_shards(folder)
    if not shards.num_samples:
        raise ValueError(f"{folder}: no samples in it")
    config = DataConfig(workers=num_threads, crop="none" if shards.members else "resized")
    stages: dict[str, Callable[[], Pieces]] = {
        "sequential": lambda: _sequential(shards),
        "random": lambda: _samples(shards, lambda data, index: None),
        "decode": lambda: _samples(shards, lambda data, index: decode_rgb(data)),
        "view": lambda: _samples(shards, lambda data, index: _view(data, index, config, image_size)),
        "loader": lambda: _batches(shards, config, image_size),
    }
    for stage, pieces in stages.items():
        if cold:
            _forget(shards)
        yield _timed(stage, pieces(), seconds)


def _timed(stage: str, pieces: Pieces, seconds: float) -> Speed:
    images, num_bytes = 0.0, 0
    start = perf_counter()
    for more_images, more_bytes in pieces:
        images, num_bytes = images + more_images, num_bytes + more_bytes
        if perf_counter() - start >= seconds:
            break
    return Speed(stage=stage, images=images, bytes=num_bytes, seconds=perf_counter() - start)


def _sequential(shards: ShardSet) -> Pieces:
    buffer = bytearray(_CHUNK_BYTES)
    for entry in shards.manifest.shards:
        images_per_byte = entry.num_samples / entry.bytes
        with (shards.folder / entry.file).open("rb", buffering=0) as file:
            while num_bytes := file.readinto(buffer):
                yield num_bytes * images_per_byte, num_bytes


def _samples(shards: ShardSet, use: Callable[[bytes, int], object]) -> Pieces:
    order = keyed_permutation(shards.num_samples, "speed", shards.fingerprint)
    with ShardReader(shards) as reader:
        for index in order.tolist():
            data = reader.read(index)
            try:
                use(data, index)
            except BadImageError as error:
                raise BadSampleError(shards, index, str(error)) from error
            yield 1, len(data)


def _view(data: bytes, index: int, config: DataConfig, image_size: int) -> object:
    return decode_view(
        data,
        lambda height, width: draw_view(config, height, width, seed=0, number=0, index=index),
        config,
        np.empty((3, image_size, image_size), np.uint8),
    )


def _batches(shards: ShardSet, config: DataConfig, image_size: int) -> Pieces:
    loader = TrainLoader(
        shards,
        config,
        image_size=image_size,
        seed=0,
        rank=0,
        world_size=1,
        micro_batch_size=min(_MICRO_BATCH_SIZE, shards.num_samples),
        grad_accum_steps=1,
    )
    with closing(loader.steps(LoaderState())) as steps:
        for step in steps:
            for batch in step.micro_batches:
                yield len(batch.indices), int(shards.length[batch.indices.numpy()].sum())


def _forget(shards: ShardSet) -> None:
    """Asks the kernel to drop the tars from its page cache."""
    for name in shards.shard_names:
        with (shards.folder / name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
