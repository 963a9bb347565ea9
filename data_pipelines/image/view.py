"""Which part of an image is seen, and its pixels.

A view is drawn as a pure function of (seed, view number, sample index), so that a stored soft label's view can be
derived again. It is five integers: top, left, height, width of a box, and 1 for a horizontal flip. The box is in
pixels of the image; for `padded` crops, of the image with its padding. Shapes: C channels, H height, W width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.config import DataConfig
from data_pipelines.image.pillow_door import BadImageError
from data_pipelines.keyed_random import keyed_uniforms

# Raised by every change after which a view is another one, or has other pixels, than it was for the same arguments.
VIEW_VERSION = 1

# Settings that `view_settings` may give, besides the version.
VIEW_FIELDS = (
    *("crop", "flip_rate", "interpolation", "crop_scale", "crop_ratio", "crop_padding", "eval_crop_rate", "transform"),
)

# An image whose short side is enlarged, and that would have more pixels then, is cut before it is resized.
_MOST_RESIZED_PIXELS = 2**22

View = tuple[int, int, int, int, int]

# RandomResizedCrop draws this many boxes before it falls back to the centre (torchvision's number).
_ATTEMPTS = 10


def draw_view(config: DataConfig, height: int, width: int, *, seed: int, number: int, index: int) -> View:
    """The training view `number` of sample `index`, of an image of `height` x `width` pixels."""
    values = keyed_uniforms(3 + 2 * _ATTEMPTS, "view", seed, number, index)
    flip, at_y, at_x = (float(value) for value in values[:3])
    if config.crop == "resized":
        box = _resized_crop(config, height, width, values[3:].tolist())
    elif config.crop == "padded":
        box = (height, width)
    elif config.crop == "none":
        return 0, 0, height, width, 0
    else:
        side = min(height, width)
        return (height - side) // 2, (width - side) // 2, side, side, int(flip < config.flip_rate)
    padding = config.crop_padding if config.crop == "padded" else 0
    top = int(at_y * (height + 2 * padding - box[0] + 1))
    left = int(at_x * (width + 2 * padding - box[1] + 1))
    return top, left, box[0], box[1], int(flip < config.flip_rate)


def view_number(config: DataConfig, epoch: int, repeat: int = 0) -> int:
    """Which view of a sample an epoch sees: a new one in each, or one of the `num_views` that come again and again."""
    number = epoch * config.num_repeats + repeat
    return number if config.num_views is None else number % config.num_views


def view_settings(config: DataConfig) -> dict[str, Any]:
    """All that a view and its pixels depend on, besides image size, seed and epoch. As JSON would give it back."""
    of_crop: dict[str, dict[str, Any]] = {
        "resized": {"crop_scale": list(config.crop_scale), "crop_ratio": list(config.crop_ratio)},
        "padded": {"crop_padding": config.crop_padding},
        "centre": {"eval_crop_rate": config.eval_crop_rate},
        "none": {},
    }
    return {
        "version": VIEW_VERSION,
        "crop": config.crop,
        "flip_rate": config.flip_rate,
        "interpolation": config.interpolation,
        **of_crop[config.crop],
        **({"transform": config.transform} if config.transform else {}),
    }


def _resized_crop(config: DataConfig, height: int, width: int, values: list[float]) -> tuple[int, int]:
    """Height and width of torchvision's RandomResizedCrop: the first of ten drawn boxes that fits.

    Where none fits, the largest box within the range of ratios. Departure: torchvision puts that one in the centre.
    """
    low, high = config.crop_scale
    log_low, log_high = math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1])
    for scale, ratio in zip(values[0::2], values[1::2], strict=True):
        area = height * width * (low + (high - low) * scale)
        aspect = math.exp(log_low + (log_high - log_low) * ratio)
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            return box_height, box_width
    if width / height < config.crop_ratio[0]:
        return min(height, max(1, round(width / config.crop_ratio[0]))), width
    if width / height > config.crop_ratio[1]:
        return height, min(width, max(1, round(height * config.crop_ratio[1])))
    return height, width


def training_pixels(image_CHW: Tensor, view: View, config: DataConfig, image_size: int) -> Tensor:
    """uint8 pixels (3, image_size, image_size) of `view`."""
    top, left, height, width, flip = view
    if config.crop == "padded" and config.crop_padding:
        image_CHW = F.pad(image_CHW, [config.crop_padding] * 4)
    if config.crop in ("centre", "none"):
        pixels_CHW = centre_pixels(image_CHW, config, image_size)
    else:
        return box_pixels(image_CHW[:, top : top + height, left : left + width], flip, config, image_size)
    return pixels_CHW.flip(2) if flip else pixels_CHW


def box_pixels(box_CHW: Tensor, flip: int, config: DataConfig, image_size: int) -> Tensor:
    """uint8 pixels (3, image_size, image_size) of a box that has been cut out."""
    pixels_CHW = resize(box_CHW, image_size, image_size, config.interpolation)
    return pixels_CHW.flip(2) if flip else pixels_CHW


def centre_pixels(image_CHW: Tensor, config: DataConfig, image_size: int) -> Tensor:
    """uint8 pixels (3, image_size, image_size) as torchvision's Resize (short side) and CenterCrop give them.

    With crop `none` they are the image as it is, in the top left corner of black ones.
    """
    height, width = image_CHW.shape[1:]
    if config.crop == "none":
        if max(height, width) > image_size:
            raise BadImageError(f"{width} x {height} pixels, more than {image_size} x {image_size} (data.crop=none)")
        return F.pad(image_CHW, [0, image_size - width, 0, image_size - height])
    short_side = round(image_size / config.eval_crop_rate)
    if height <= width:
        size = short_side, int(short_side * width / height)
    else:
        size = int(short_side * height / width), short_side
    top, left = round((size[0] - image_size) / 2), round((size[1] - image_size) / 2)
    if size[0] * size[1] > _MOST_RESIZED_PIXELS and short_side > min(height, width):
        image_CHW, size, (top, left) = _around_centre(image_CHW, size, (top, left), short_side, image_size)
    resized_CHW = resize(image_CHW, *size, config.interpolation)
    return resized_CHW[:, top : top + image_size, left : left + image_size]


def _around_centre(
    image_CHW: Tensor, size: tuple[int, int], at: tuple[int, int], short_side: int, image_size: int
) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
    """Of a narrow image to be enlarged to `size`, whose place `at` (top, left) is wanted: part, its size, the place.

    A line of 60,000 pixels would become one of 15 million. The part consists of squares of the short side, which become
    squares: so it is sampled where the whole would be, to within half a pixel.
    """
    axis = 1 if size[0] > size[1] else 2
    unit, start = min(image_CHW.shape[1:]), at[axis - 1]
    first, last = max(0, start // short_side - 2), (start + image_size) // short_side + 3
    part_CHW = image_CHW.narrow(axis, first * unit, min(last * unit, image_CHW.shape[axis]) - first * unit)
    length, place = part_CHW.shape[axis] * short_side // unit, start - first * short_side
    return (part_CHW, (length, size[1]), (place, at[1])) if axis == 1 else (part_CHW, (size[0], length), (at[0], place))


def resize(image_CHW: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    """uint8 pixels (3, height, width), antialiased: within rounding of Pillow's result."""
    if image_CHW.shape[1:] == (height, width):
        return image_CHW
    # torch's fast uint8 kernel wants channels-last memory, and resizes a view without copying it first.
    image_1CHW = image_CHW[None]
    assert image_1CHW.dtype == torch.uint8
    return F.interpolate(image_1CHW, (height, width), mode=interpolation, align_corners=False, antialias=True)[0]
