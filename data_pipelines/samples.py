"""One sample: its pixels as training or evaluation sees them, its label and view. Bad samples are handled here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from data_pipelines.config import DataConfig
from data_pipelines.decode import DecodeError, decode_rgb, decode_view
from data_pipelines.index import ShardSet
from data_pipelines.keyed import keyed_words
from data_pipelines.reader import BadSampleError, ShardReader
from data_pipelines.transform import apply_transform, load_transform
from data_pipelines.view import View, centre_pixels, draw_view, training_pixels, view_number

# Substitutes that are tried for one bad sample before the run stops.
_MAX_SUBSTITUTES = 16


@dataclass(frozen=True, slots=True)
class Sample:
    """`pixels` is uint8 (3, H, W); `index` is that of the sample which was read, a substitute's included."""

    pixels: Tensor
    label: int
    index: int
    view: View
    view_number: int


class SampleSource(Protocol):
    """Called by several threads at once."""

    def __call__(self, epoch: int, index: int, repeat: int) -> Sample: ...


class EvaluationSamples:
    """The centre of each image. A bad sample is an error, because evaluation counts every sample once."""

    def __init__(self, reader: ShardReader, shards: ShardSet, config: DataConfig, image_size: int) -> None:
        self._reader, self._shards, self._config, self._image_size = reader, shards, config, image_size

    def __call__(self, epoch: int, index: int, repeat: int) -> Sample:
        try:
            image_CHW = decode_rgb(self._reader.read(index), max_pixels=self._config.max_pixels)
        except DecodeError as error:
            raise BadSampleError(self._shards, index, str(error)) from error
        pixels_CHW = centre_pixels(image_CHW, self._config, self._image_size)
        return Sample(pixels_CHW, int(self._shards.label[index]), index, (0, 0, *image_CHW.shape[1:], 0), 0)


class TrainingSamples:
    """The drawn view of each image. A bad sample is replaced by another, a function of what decided on the first."""

    def __init__(
        self,
        reader: ShardReader,
        shards: ShardSet,
        config: DataConfig,
        *,
        image_size: int,
        seed: int,
        on_bad_sample: Callable[[int, BadSampleError], None],
    ) -> None:
        self._reader, self._shards, self._config = reader, shards, config
        self._image_size, self._seed, self._on_bad_sample = image_size, seed, on_bad_sample
        self._view_seed = seed if config.view_seed is None else config.view_seed
        self._transform = load_transform(config.transform) if config.transform else None

    def __call__(self, epoch: int, index: int, repeat: int) -> Sample:
        try:
            return self._read(epoch, index, repeat)
        except BadSampleError as error:
            self._on_bad_sample(epoch, error)
        return self._substitute(epoch, index, repeat)

    def _substitute(self, epoch: int, bad_index: int, repeat: int) -> Sample:
        words = keyed_words(_MAX_SUBSTITUTES, "substitute", self._seed, epoch, bad_index, repeat)
        for word in words.tolist():
            try:
                return self._read(epoch, word % self._shards.num_samples, repeat)
            except BadSampleError as error:
                self._on_bad_sample(epoch, error)
                last_error = error
        raise ValueError(f"{_MAX_SUBSTITUTES} substitutes for a bad sample were bad as well; the last: {last_error}")

    def _read(self, epoch: int, index: int, repeat: int) -> Sample:
        config = self._config
        number = view_number(config, epoch, repeat)

        def draw(height: int, width: int) -> View:
            return draw_view(config, height, width, seed=self._view_seed, number=number, index=index)

        data = self._reader.read(index)
        try:
            if config.crop == "resized":
                pixels_CHW, view = decode_view(data, draw, config, self._image_size)
            else:
                image_CHW = decode_rgb(data, max_pixels=config.max_pixels)
                view = draw(*image_CHW.shape[1:])
                pixels_CHW = training_pixels(image_CHW, view, config, self._image_size)
        except DecodeError as error:
            raise BadSampleError(self._shards, index, str(error)) from error
        if config.transform and self._transform:
            pixels_CHW = apply_transform(
                config.transform,
                self._transform,
                pixels_CHW,
                key=self._shards.key(index),
                labels=(self._view_seed, number, index),
            )
        return Sample(pixels_CHW, int(self._shards.label[index]), index, view, number)
