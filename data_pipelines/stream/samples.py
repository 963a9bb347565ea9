"""One sample: its pixels as training or evaluation sees them, its label and view. Bad samples are handled here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipelines.config import DataConfig
from data_pipelines.image.decode import decode_rgb, decode_view
from data_pipelines.image.map_png import decode_maps
from data_pipelines.image.pillow_door import BadImageError
from data_pipelines.image.user_transform import Transform, apply_transform
from data_pipelines.image.view import View, centre_pixels, draw_view, training_pixels, view_number
from data_pipelines.keyed_random import keyed_words
from data_pipelines.shards.index import ShardSet
from data_pipelines.stream.reader import BadSampleError, ShardReader, sample_name
from data_pipelines.text.pieces import TARGET
from data_pipelines.user_functions import function_of_user

# Substitutes that are tried for one bad sample before the run stops.
_MAX_SUBSTITUTES = 16


@dataclass(frozen=True, slots=True)
class Sample:
    """What belongs to the pixels of a sample; `index` is that of the sample which was read, a substitute's included.

    `maps`: its label map and attributes by name, (h, w) each, at the size of the image.
    """

    label: int
    index: int
    view: View
    view_number: int
    maps: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class SampleSource(Protocol):
    """Writes a sample's pixels to `out_CHW`, uint8 (3, size, size), or its text to (N,). Called by several threads."""

    def __call__(self, epoch: int, index: int, repeat: int, out_CHW: NDArray[np.uint8]) -> Sample: ...


def read_text(reader: ShardReader, shards: ShardSet, index: int, out_N: NDArray[np.uint8], number: int) -> Sample:
    """Writes a window's bytes to `out_N`, zeros behind them; its view is the part that counts: start, and length.

    Of a pair source and target to (2, N); the view says their lengths at the same places.
    """
    if shards.is_pairs:
        sides = reader.read(index), reader.read(index, TARGET)
        for data, out in zip(sides, out_N, strict=True):
            out[: len(data)], out[len(data) :] = np.frombuffer(data, np.uint8), 0
        return Sample(int(shards.label[index]), index, (0, len(sides[0]), 1, len(sides[1]), 0), number)
    data, counted = reader.read(index), int(shards.height[index])
    out_N[: len(data)], out_N[len(data) :] = np.frombuffer(data, np.uint8), 0
    return Sample(int(shards.label[index]), index, (0, len(data) - counted, 1, counted, 0), number)


class EvaluationSamples:
    """The centre of each image. A bad sample is an error, because evaluation counts every sample once."""

    def __init__(self, reader: ShardReader, shards: ShardSet, config: DataConfig) -> None:
        self._reader, self._shards, self._config = reader, shards, config

    def __call__(self, epoch: int, index: int, repeat: int, out_CHW: NDArray[np.uint8]) -> Sample:
        if self._shards.is_text:
            return read_text(self._reader, self._shards, index, out_CHW, 0)
        try:
            image_CHW = decode_rgb(self._reader.read(index), max_pixels=self._config.max_pixels)
            out_CHW[...] = centre_pixels(image_CHW, self._config, out_CHW.shape[1]).numpy()
            height, width = image_CHW.shape[1:]
            read, num_classes = partial(self._reader.read, index), self._shards.num_classes
            maps = decode_maps(self._shards.members, read, height, width, num_classes)
        except BadImageError as error:
            raise BadSampleError(self._shards, index, str(error)) from error
        return Sample(int(self._shards.label[index]), index, (0, 0, height, width, 0), 0, maps)


class TrainingSamples:
    """The drawn view of each image. A bad sample is replaced by another, a function of what decided on the first."""

    def __init__(
        self,
        reader: ShardReader,
        shards: ShardSet,
        config: DataConfig,
        *,
        seed: int,
        on_bad_sample: Callable[[int, BadSampleError], None],
    ) -> None:
        self._reader, self._shards, self._config = reader, shards, config
        self._seed, self._on_bad_sample = seed, on_bad_sample
        self._view_seed = seed if config.view_seed is None else config.view_seed
        name = config.transform
        self._transform: Transform | None = function_of_user(name, f"data.transform {name}") if name else None

    def __call__(self, epoch: int, index: int, repeat: int, out_CHW: NDArray[np.uint8]) -> Sample:
        try:
            return self._read(epoch, index, repeat, out_CHW)
        except BadSampleError as error:
            self._on_bad_sample(epoch, error)
        return self._substitute(epoch, index, repeat, out_CHW)

    def _substitute(self, epoch: int, bad_index: int, repeat: int, out_CHW: NDArray[np.uint8]) -> Sample:
        words = keyed_words(_MAX_SUBSTITUTES, "substitute", self._seed, epoch, bad_index, repeat)
        for word in words.tolist():
            try:
                return self._read(epoch, word % self._shards.num_samples, repeat, out_CHW)
            except BadSampleError as error:
                self._on_bad_sample(epoch, error)
                last_error = error
        raise ValueError(
            f"{_MAX_SUBSTITUTES} substitutes for a bad sample were bad as well; the last: {last_error}; "
            f"see what `sret-scale shards verify` says of {self._shards.folder}"
        )

    def _read(self, epoch: int, index: int, repeat: int, out_CHW: NDArray[np.uint8]) -> Sample:
        config = self._config
        number = view_number(config, epoch, repeat)
        if self._shards.is_text:
            return read_text(self._reader, self._shards, index, out_CHW, number)

        def draw(height: int, width: int) -> View:
            return draw_view(config, height, width, seed=self._view_seed, number=number, index=index)

        data = self._reader.read(index)
        try:
            if config.crop == "resized":
                view = decode_view(data, draw, config, out_CHW)
            else:
                image_CHW = decode_rgb(data, max_pixels=config.max_pixels)
                view = draw(*image_CHW.shape[1:])
                out_CHW[...] = training_pixels(image_CHW, view, config, out_CHW.shape[1]).numpy()
            read, num_classes = partial(self._reader.read, index), self._shards.num_classes
            maps = decode_maps(self._shards.members, read, *view[2:4], num_classes)
        except BadImageError as error:
            raise BadSampleError(self._shards, index, str(error)) from error
        if config.transform and self._transform:
            where, seeds = sample_name(self._shards, index), (self._view_seed, number, index)
            apply_transform(config.transform, self._transform, out_CHW, sample=where, labels=seeds)
        return Sample(int(self._shards.label[index]), index, view, number, maps)
