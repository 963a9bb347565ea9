"""Image bytes to uint8 RGB pixels.

simplejpeg (libjpeg-turbo, releases the GIL) decodes JPEG; Pillow decodes everything else: PNG, WebP, CMYK JPEG, the
PNG that ImageNet hides under `.JPEG`, and JPEG that libjpeg-turbo complains about. Orientation tags are not
applied, as in torchvision's ImageFolder. Sizes are checked in the header, before any pixel is decoded.
"""

from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.config import MAX_PIXELS, DataConfig
from data_pipelines.image.native import library as roi
from data_pipelines.image.pillow_door import BadImageError, converted, opened
from data_pipelines.image.view import View, box_pixels


def decode_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Pixels as a uint8 tensor (3, H, W), stored channels-last. Grey becomes RGB, transparency is dropped.

    Raises BadImageError for what is empty, broken, animated, or larger than `max_pixels`.
    """
    if not data:
        raise BadImageError("empty image")
    pixels_HWC = _decode_jpeg(data, max_pixels) if simplejpeg.is_jpeg(data) else None
    if pixels_HWC is None:
        pixels_HWC = _decode_any(data, max_pixels)
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def decode_view(data: bytes, draw: Callable[[int, int], View], config: DataConfig, out_CHW: NDArray[np.uint8]) -> View:
    """Writes the pixels of a `resized` view to `out_CHW`: those that `box_pixels` makes of its box in decode_rgb(data).

    `draw(height, width)` gives the view of an image of that size. Raises BadImageError as decode_rgb does.
    """
    if simplejpeg.is_jpeg(data):
        size = _jpeg_size(data, config.max_pixels)
        if size is not None:
            view = draw(*size)
            if roi.decode_view(data, view, config.interpolation, out_CHW):
                return view
    image_CHW = decode_rgb(data, max_pixels=config.max_pixels)
    view = draw(*image_CHW.shape[1:])
    top, left, height, width, flip = view
    box_CHW = image_CHW[:, top : top + height, left : left + width]
    out_CHW[...] = box_pixels(box_CHW, flip, config, out_CHW.shape[1]).numpy()
    return view


def _decode_jpeg(data: bytes, max_pixels: int) -> NDArray[np.uint8] | None:
    """RGB pixels (H, W, 3), or None for a JPEG that is left to Pillow: CMYK, or with warnings from libjpeg-turbo."""
    if _jpeg_size(data, max_pixels) is None:
        return None
    try:
        pixels_HWC: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except Exception:
        # simplejpeg raises other errors than its own too, KeyError for 4:4:1; Pillow decides.
        return None
    return pixels_HWC


def _jpeg_size(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Height and width, or None for a JPEG that is left to Pillow."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except Exception:
        return None
    _check_size(height, width, max_pixels)
    return None if colorspace in ("CMYK", "YCCK") else (height, width)


def _decode_any(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """RGB pixels (H, W, 3) by Pillow."""
    with opened(data) as image:
        _check_size(image.height, image.width, max_pixels)
        if image.format != "JPEG" and getattr(image, "is_animated", False):
            raise BadImageError("animated image")
        return np.array(converted(image).convert("RGB"))


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise BadImageError(f"image of {width} x {height} pixels")
    if height * width > max_pixels:
        raise BadImageError(f"image of {width} x {height} pixels, larger than the limit of {max_pixels}")
