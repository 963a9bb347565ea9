"""What happens to each image of a batch: names and strengths of `pixel_operations`, one a layer, drawn by the host.

A draw is a function of what it is keyed by, a sample and its view, so it is the same in every batch and on every rank.
U is the number of uniforms that a layer needs. Shapes: B images.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipelines.image.pixel_operations import Strengths

Uniforms = NDArray[np.float64]
LAYER_UNIFORMS = 5
"""Columns of a layer: which operation, its sign, whether it happens, and two for its strength."""


class Layer(NamedTuple):
    """One operation for each image of a batch."""

    names: list[str]
    strengths: Strengths


class Policy(NamedTuple):
    """The operations of a RandAugment, the share of images that a layer changes, and what lies beyond edges."""

    names: tuple[str, ...]
    rate: float
    fill: tuple[int, int, int]


BLENDS = ("brightness", "color", "contrast", "sharpness")
COMMON = (*BLENDS, "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "posterize", "solarize")
POLICIES = {
    "torchvision": Policy((*COMMON, "autocontrast", "equalize", "identity"), 1.0, (0, 0, 0)),
    "timm": Policy((*COMMON, "autocontrast", "equalize", "invert", "solarize_add"), 0.5, (124, 116, 104)),
}


def randaugment_layer(policy: str, uniforms_BU: Uniforms, magnitude: float, height: int, width: int) -> Layer:
    """An operation of torchvision's RandAugment at bin `magnitude` of its 31, or of timm's `rand-m9-mstd0.5-inc1`,
    whose levels are normal around the magnitude and end at 10."""
    names, rate, _ = POLICIES[policy]
    is_timm = policy == "timm"

    def drawn(which: float, sign: float, happens: bool, level: float) -> tuple[str, float]:
        name = names[int(which * len(names))] if happens else "identity"
        if name in BLENDS:
            return name, max(0.1, 1 + sign * 0.9 * level)
        if name == "invert":
            return "solarize", 0.0
        side = width if name == "translate_x" else height
        shift = 0.45 * side * level if is_timm else float(int(150 / 331 * side * level))
        strengths = {
            "translate_x": sign * shift,
            "translate_y": sign * shift,
            "shear_x": sign * 0.3 * level,
            "shear_y": sign * 0.3 * level,
            "rotate": sign * 30 * level,
            "posterize": float(4 - int(4 * level) if is_timm else np.round(8 - 4 * level)),
            "solarize": float(256 - int(256 * level)) if is_timm else 255 * (1 - level),
            "solarize_add": float(int(110 * level)),
        }
        return name, strengths.get(name, 0.0)

    which_B, sign_B, happens_B, *normal = uniforms_BU.T
    levels_B = np.full(len(which_B), magnitude / 30)
    if is_timm:
        normal_B = np.sqrt(-2 * np.log1p(-normal[0])) * np.cos(2 * np.pi * normal[1])
        levels_B = np.clip(magnitude + 0.5 * normal_B, 0, 10) / 10
    signs_B = np.where(sign_B <= 0.5, -1.0, 1.0)
    pairs = list(map(drawn, which_B, signs_B, happens_B <= rate, levels_B))
    return Layer([name for name, _ in pairs], np.array([strength for _, strength in pairs]))


def three_augment_layer(uniforms_BU: Uniforms, rate: float) -> Layer:
    """3-Augment of DeiT III (arXiv 2204.07118, section 3.2): grey, solarised or blurred, a third of the samples each.

    Strengths are those of its code: solarised above half, blurred by a Gaussian of 0.1 to 2 pixels' deviation. Colour
    jitter follows, as there; crop and flip belong to the data.
    """
    which_B, _, happens_B, blur_B, _ = uniforms_BU.T
    kinds = ("grey", "solarize", "blur")
    names = [
        kinds[int(3 * which)] if happens < rate else "identity"
        for which, happens in zip(which_B, happens_B, strict=True)
    ]
    return Layer(names, np.where([name == "blur" for name in names], 0.1 + 1.9 * blur_B, 128.0))


def jitter_layers(uniforms_BU: Uniforms, strength: float) -> list[Layer]:
    """Brightness, contrast and saturation in an order of each image's own, factors around 1 (torchvision's)."""
    kinds = ("brightness", "contrast", "color")
    order_B3 = np.argsort(uniforms_BU[:, :3], axis=1, kind="stable")
    low, high = max(0.0, 1 - strength), 1 + strength
    factors_B3 = low + (high - low) * uniforms_BU[:, 3:6]
    return [Layer([kinds[which] for which in order_B3[:, place]], factors_B3[:, place]) for place in range(3)]
