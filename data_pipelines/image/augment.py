"""Augmentation of a batch on its device: RandAugment, 3-Augment, colour jitter, erasing, mixup, cutmix of torchvision.

Everything is a pure function of the batch and one seed. torchvision draws from torch's global generators, so they
are forked and seeded for the length of a call. Shapes: B batch, C channels (or classes), H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.config import IMAGENET_MEAN, IMAGENET_STD
from data_pipelines.image.upload import uploaded


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Which augmentations a batch gets. Zero switches one off.

    randaugment_ops, randaugment_magnitude: RandAugment's operations a sample, and their strength (0 to 30).
    three_augment_rate: share of samples that get one of 3-Augment's operations (see `three_augment`).
    color_jitter: strength of brightness, contrast and saturation.
    erase_rate: share of samples with an erased box.
    mixup_alpha, cutmix_alpha: parameter of the beta distribution.
    mix_rate: share of batches that are mixed.
    cutmix_rate: share of cutmix among these where both are on.
    """

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
        for name in ("three_augment_rate", "erase_rate", "mix_rate", "cutmix_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name}: expected a share between 0 and 1, got {getattr(self, name)!r}")
        for name in ("randaugment_ops", "color_jitter", "mixup_alpha", "cutmix_alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"augment.{name}: expected 0 or more, got {getattr(self, name)!r}")
        if not 0 <= self.randaugment_magnitude <= 30:
            raise ValueError(f"augment.randaugment_magnitude: expected 0 to 30, got {self.randaugment_magnitude!r}")


# Pixels to each side that the blur of 3-Augment looks at: three deviations at its strongest.
_BLUR_REACH = 6


def _transforms() -> Any:
    """torchvision.transforms.v2. Imported by whoever augments: it takes 1.7 s and 1,200 files (2-core AMD EPYC,
    2026-11-22), which a launcher or a command that only reads a configuration need not wait for."""
    return import_module("data_pipelines.image.torchvision_door").v2


def three_augment() -> Any:
    """3-Augment of DeiT III (arXiv 2204.07118, section 3.2): grey, solarised or blurred, a third of the samples each.

    Strengths are those of its code: solarised above half, blurred by a Gaussian of 0.1 to 2 pixels' deviation. Colour
    jitter follows, as there; crop and flip belong to the data.
    """
    v2 = _transforms()
    blur = v2.GaussianBlur(kernel_size=2 * _BLUR_REACH + 1, sigma=(0.1, 2.0))
    return v2.RandomChoice([v2.Grayscale(num_output_channels=3), v2.RandomSolarize(threshold=128, p=1.0), blur])


class BatchAugment:
    """Gives pixels in [0, 1] as float32 (B, C, H, W), and class probabilities (B, num_classes).

    Labels are class ids (B,), or rows of floats, such as a teacher's probabilities, which are mixed as they are.
    """

    def __init__(self, config: AugmentConfig, num_classes: int) -> None:
        self.config = config
        self.num_classes = num_classes
        self._sample_transforms: list[Any] = []
        used = (config.randaugment_ops, config.three_augment_rate, config.color_jitter)
        v2: Any = _transforms() if any((*used, config.erase_rate, config.mixup_alpha, config.cutmix_alpha)) else None
        if config.randaugment_ops:
            randaugment = v2.RandAugment(num_ops=config.randaugment_ops, magnitude=config.randaugment_magnitude)
            self._sample_transforms.append(randaugment)
        if config.three_augment_rate:
            self._sample_transforms.append(v2.RandomApply([three_augment()], p=config.three_augment_rate))
        if config.color_jitter:
            self._sample_transforms.append(v2.ColorJitter(*[config.color_jitter] * 3))
        self._erase = v2.RandomErasing(p=config.erase_rate, value="random") if config.erase_rate else None
        self._mixup = v2.MixUp(alpha=config.mixup_alpha) if config.mixup_alpha else None
        self._cutmix = v2.CutMix(alpha=config.cutmix_alpha) if config.cutmix_alpha else None

    def __call__(self, images_BCHW: Tensor, labels: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
        """Mixing pairs each sample with its neighbour in the batch, so the result depends on how a batch is cut."""
        assert images_BCHW.dtype == torch.uint8
        devices = [images_BCHW.device] if images_BCHW.is_cuda else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed)
            # Operation and strength are drawn per sample: a v2 transform draws once for all that it is given.
            for transform in self._sample_transforms:
                images_BCHW = torch.stack([transform(image_CHW) for image_CHW in images_BCHW])
            # In place: fresh memory for each operation costs more than the arithmetic.
            unit_BCHW = images_BCHW.float().div_(255)
            if self._erase is not None:
                unit_BCHW = torch.stack([self._erase_box(unit_CHW) for unit_CHW in unit_BCHW])
            target_BC = labels if labels.ndim == 2 else F.one_hot(labels, self.num_classes).float()
            return self._mix(unit_BCHW, target_BC)

    def _erase_box(self, unit_CHW: Tensor) -> Tensor:
        """Normal noise in a box, of mean 0.5 and deviation 0.25: about N(0, 1) after normalisation, as in timm."""
        assert self._erase is not None
        signed_CHW = (unit_CHW - 0.5) * 4
        # What torchvision's own call does, with its draws, except that it copies the noise while the host waits.
        if torch.rand(1) < self._erase.p:
            box = self._erase.make_params([signed_CHW])
            if box["v"] is not None:
                rows, columns = slice(box["i"], box["i"] + box["h"]), slice(box["j"], box["j"] + box["w"])
                signed_CHW[:, rows, columns] = uploaded(box["v"], signed_CHW.device)
        return signed_CHW.div_(4).add_(0.5).clamp_(0, 1)

    def _mix(self, unit_BCHW: Tensor, target_BC: Tensor) -> tuple[Tensor, Tensor]:
        mixers = [mixer for mixer in (self._mixup, self._cutmix) if mixer is not None]
        is_mixed, choice = (float(value) for value in torch.rand(2))
        if not mixers or len(target_BC) < 2 or is_mixed >= self.config.mix_rate:
            return unit_BCHW, target_BC
        mixer = mixers[-1] if choice < self.config.cutmix_rate else mixers[0]
        mixed_BCHW, mixed_BC = mixer(unit_BCHW, target_BC)
        return mixed_BCHW, mixed_BC


def normalise(unit_BCHW: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """Pixels in [0, 1] to (unit - mean) / std per channel."""
    return normalise_(unit_BCHW.clone(), mean, std)


def normalise_(unit_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The same in the memory of `unit_BCHW`: on a CPU, fresh memory costs as much as the arithmetic."""
    # Filled on the device: tables of the host would make it wait for all that a GPU has to do.
    mean_C11, std_C11 = (torch.stack([unit_BCHW.new_full((1, 1), value) for value in values]) for values in (mean, std))
    return unit_BCHW.sub_(mean_C11).div_(std_C11)
