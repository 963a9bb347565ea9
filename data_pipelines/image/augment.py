"""Augmentation of a batch on its device: RandAugment, 3-Augment, colour jitter, erasing, mixup, cutmix.

What happens to a sample is a function of the sample and its view, or of a seed and its place in the batch; only
mixing, which pairs neighbours, depends on how a batch is cut. The host draws, and waits for nothing. Shapes: B batch,
C channels (or classes), H height, W width, U uniforms of a sample.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.config import IMAGENET_MEAN, IMAGENET_STD
from data_pipelines.field_checks import check_fields
from data_pipelines.image import policies
from data_pipelines.image.batch_memory import Recycler
from data_pipelines.image.pixel_operations import apply_operations_
from data_pipelines.keyed_random import keyed_words


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Which augmentations a batch gets. Zero switches one off.

    randaugment_ops, randaugment_magnitude: RandAugment's operations a sample, and their strength (0 to 30).
    three_augment_rate: share of samples that get one of 3-Augment's operations: grey, solarised or blurred.
    color_jitter: strength of brightness, contrast and saturation.
    erase_rate: share of samples with an erased box.
    mixup_alpha, cutmix_alpha: parameter of the beta distribution.
    mix_rate: share of batches that are mixed.
    cutmix_rate: share of cutmix among these where both are on.
    """

    policy: Literal["torchvision", "timm"] = "torchvision"
    """Whose RandAugment: operations and strengths of torchvision's, or of timm's `rand-m9-mstd0.5-inc1`, whose strength
    ends at 10. Geometry is bilinear in both."""
    randaugment_ops: int = 2
    randaugment_magnitude: int = 9
    three_augment_rate: float = 0.0
    color_jitter: float = 0.0
    erase_rate: float = 0.25
    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    mix_rate: float = 1.0
    cutmix_rate: float = 0.5

    def __post_init__(self) -> None:
        bounds = {
            "between 0 and 1": "three_augment_rate erase_rate mix_rate cutmix_rate",
            "0 or more": "randaugment_ops color_jitter mixup_alpha cutmix_alpha",
            "0 to 30": "randaugment_magnitude",
        }
        check_fields(self, "augment", bounds)


_ERASE_TRIES = 10


class BatchAugment:
    """Gives pixels in [0, 1] as float32 (B, C, H, W), and class probabilities (B, num_classes).

    Labels are class ids (B,), or rows of floats, such as a teacher's probabilities, which are mixed as they are.
    """

    def __init__(self, config: AugmentConfig, num_classes: int) -> None:
        self.config = config
        self.num_classes = num_classes
        self._recycler = Recycler()
        used = (config.randaugment_ops, config.three_augment_rate, config.color_jitter, config.erase_rate)
        most = policies.LAYER_UNIFORMS * (config.randaugment_ops + 1) + 6 + 2 * _ERASE_TRIES + 4
        self._num_uniforms = most if any(used) else policies.LAYER_UNIFORMS * (config.randaugment_ops + 1)

    def __call__(
        self, images_BCHW: Tensor, labels: Tensor, *, seed: int, keys: Sequence[tuple[int, ...]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """keys: what the draws of each sample are functions of; None: the seed and its place in the batch."""
        pixels_BCHW, target_BC = self.pixels(images_BCHW, labels, seed=seed, keys=keys)
        return as_unit(pixels_BCHW), target_BC

    @torch.no_grad()
    def pixels(
        self, images_BCHW: Tensor, labels: Tensor, *, seed: int, keys: Sequence[tuple[int, ...]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same; pixels stay uint8 where nothing is erased or mixed."""
        config = self.config
        assert images_BCHW.dtype == torch.uint8
        target_BC = labels if labels.ndim == 2 else F.one_hot(labels, self.num_classes).float()
        keys = [(seed, row) for row in range(len(images_BCHW))] if keys is None else keys
        words_BU = np.stack([keyed_words(self._num_uniforms, "augment", *key) for key in keys])
        uniforms_BU = (words_BU >> np.uint64(11)).astype(np.float64) * 2.0**-53
        layers = list(self._layers(uniforms_BU, *images_BCHW.shape[-2:]))
        if layers:
            images_BCHW = self._memory(images_BCHW, torch.uint8).copy_(images_BCHW)
        for layer in layers:
            apply_operations_(images_BCHW, layer.names, layer.strengths, policies.POLICIES[config.policy].fill)
        if not (config.erase_rate or config.mixup_alpha or config.cutmix_alpha):
            return images_BCHW, target_BC
        unit_BCHW = self._memory(images_BCHW, torch.float32).copy_(images_BCHW).div_(255)
        if config.erase_rate:
            erase_(unit_BCHW, uniforms_BU[:, -2 * _ERASE_TRIES - 4 :], config.erase_rate, words_BU[:, -1].tolist())
        return unit_BCHW, self._mix_(unit_BCHW, target_BC, seed)

    def _memory(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """On a CPU, of batches that are gone: fresh memory costs as much as the arithmetic."""
        if like.device.type == "cpu":
            return self._recycler.take(like.shape, dtype)
        return torch.empty_like(like, dtype=dtype)

    def _layers(self, uniforms_BU: policies.Uniforms, height: int, width: int) -> Iterator[policies.Layer]:
        config = self.config
        end = policies.LAYER_UNIFORMS * (config.randaugment_ops + 1)
        parts = np.split(uniforms_BU[:, :end], config.randaugment_ops + 1, axis=1)
        for part_BU in parts[:-1]:
            yield policies.randaugment_layer(config.policy, part_BU, config.randaugment_magnitude, height, width)
        if config.three_augment_rate:
            yield policies.three_augment_layer(parts[-1], config.three_augment_rate)
        if config.color_jitter:
            yield from policies.jitter_layers(uniforms_BU[:, end:], config.color_jitter)

    def _mix_(self, unit_BCHW: Tensor, target_BC: Tensor, seed: int) -> Tensor:
        """Each sample with the one before it, in the same parts in the whole batch, as torchvision's; the targets."""
        config, generator = self.config, np.random.Generator(np.random.PCG64(seed))
        is_mixed, choice, x, y = generator.random(4)
        if not (config.mixup_alpha or config.cutmix_alpha) or len(target_BC) < 2 or is_mixed >= config.mix_rate:
            return target_BC
        is_cutmix = config.cutmix_alpha > 0 and (choice < config.cutmix_rate or not config.mixup_alpha)
        alpha = config.cutmix_alpha if is_cutmix else config.mixup_alpha
        share = generator.beta(alpha, alpha)
        if is_cutmix:
            height, width = unit_BCHW.shape[-2:]
            rows, columns = (_part(place, size, share) for place, size in ((y, height), (x, width)))
            unit_BCHW[..., rows, columns] = unit_BCHW[..., rows, columns].roll(1, 0)
            share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
        else:
            before_BCHW = self._memory(unit_BCHW, torch.float32)
            before_BCHW[0].copy_(unit_BCHW[-1])
            before_BCHW[1:].copy_(unit_BCHW[:-1])
            unit_BCHW.lerp_(before_BCHW, 1 - share)
        return torch.lerp(target_BC.roll(1, 0), target_BC, share)


def _part(place: float, size: int, share: float) -> slice:
    """Along one side, the box around a place that covers 1 - share of an image, cut at its edges."""
    middle, reach = int(place * size), int(0.5 * (1 - share) ** 0.5 * size)
    return slice(max(middle - reach, 0), min(middle + reach, size))


def erase_(unit_BCHW: Tensor, uniforms_BU: policies.Uniforms, rate: float, seeds: Sequence[int]) -> None:
    """Noise in a box of 2 to 33 % of a share of the images, in place: torchvision's RandomErasing.

    It has mean 0.5 and deviation 0.25: about N(0, 1) after normalisation, as in timm.
    """
    height, width = unit_BCHW.shape[-2:]
    areas_BT = height * width * (0.02 + 0.31 * uniforms_BU[:, :_ERASE_TRIES])
    ratios_BT = np.exp(np.log(0.3) + (np.log(3.3) - np.log(0.3)) * uniforms_BU[:, _ERASE_TRIES : 2 * _ERASE_TRIES])
    sides: list[NDArray[np.int64]] = [
        np.rint(np.sqrt(areas_BT * factor_BT)).astype(np.int64) for factor_BT in (ratios_BT, 1 / ratios_BT)
    ]
    fits_BT = (sides[0] < height) & (sides[1] < width)
    first_B = fits_BT.argmax(axis=1)
    for row in np.flatnonzero(fits_BT.any(axis=1) & (uniforms_BU[:, -4] < rate)).tolist():
        box = [int(side[row, first_B[row]]) for side in sides]
        top, left = (
            int(uniforms_BU[row, place] * (size - side + 1))
            for place, size, side in zip((-3, -2), (height, width), box, strict=True)
        )
        noise = torch.Generator(unit_BCHW.device).manual_seed(seeds[row] >> 1)
        place_CHW = unit_BCHW[row, :, top : top + box[0], left : left + box[1]]
        place_CHW.normal_(0.5, 0.25, generator=noise).clamp_(0, 1)


def as_unit(pixels_BCHW: Tensor) -> Tensor:
    """Pixels in [0, 1] as float32, of uint8 or of themselves."""
    return pixels_BCHW if pixels_BCHW.is_floating_point() else pixels_BCHW.float().div_(255)


def normalise(unit_BCHW: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """Pixels in [0, 1] to (unit - mean) / std per channel."""
    return normalise_(unit_BCHW.clone(), mean, std)


def normalise_(unit_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The same in the memory of `unit_BCHW`: on a CPU, fresh memory costs as much as the arithmetic."""
    # Filled on the device: tables of the host would make it wait for all that a GPU has to do.
    mean_C11, std_C11 = (torch.stack([unit_BCHW.new_full((1, 1), value) for value in values]) for values in (mean, std))
    return unit_BCHW.sub_(mean_C11).div_(std_C11)
