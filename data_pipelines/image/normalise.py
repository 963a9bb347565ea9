"""uint8 pixels to what the model computes on: (pixel / 255 - mean) / std per channel, as float32.

Where the optional library of `roi.py` is built, pixels on a CPU take one pass instead of four. The bits are the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipelines.config import IMAGENET_MEAN, IMAGENET_STD
from data_pipelines.image.augment import normalise_
from data_pipelines.image.batch_memory import Recycler
from data_pipelines.image.native import library as roi


class Normaliser:
    """Normalises batches of uint8 pixels on their device. On a CPU, memory of batches that are gone is used again."""

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        self._mean, self._std = tuple(mean), tuple(std)
        self._recycler = Recycler()

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """float32 of the shape of the uint8 `images_BCHW`; pixels in [0, 1] are normalised in their own memory."""
        if images_BCHW.is_floating_point():
            return normalise_(images_BCHW, self._mean, self._std)
        assert images_BCHW.dtype == torch.uint8 and images_BCHW.shape[1] == len(self._mean)
        if images_BCHW.device.type != "cpu":
            return normalise_(images_BCHW.float().div_(255), self._mean, self._std)
        result_BCHW = self._recycler.take(images_BCHW.shape, torch.float32)
        if not (images_BCHW.is_contiguous() and roi.normalise(images_BCHW, self._mean, self._std, result_BCHW)):
            normalise_(result_BCHW.copy_(images_BCHW).div_(255), self._mean, self._std)
        return result_BCHW
