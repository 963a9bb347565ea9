"""Image bytes to uint8 RGB pixels.

simplejpeg (libjpeg-turbo, releases the GIL) decodes JPEG; Pillow decodes everything else: PNG, WebP, CMYK JPEG, the
PNG that ImageNet hides under `.JPEG`, and JPEG that libjpeg-turbo complains about. Orientation tags are not
applied, as in torchvision's ImageFolder. Sizes are checked in the header, before any pixel is decoded.
"""

import io
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data_pipelines.config import MAX_PIXELS, DataConfig
from data_pipelines.image.native import library as roi
from data_pipelines.image.view import View, box_pixels

# Formats by name, so that no bytes reach Pillow's decoders that start other programs (EPS) or are rarely exercised.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


class DecodeError(ValueError):
    """Bytes that are not an image that can be used; the message is the reason."""


def decode_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Pixels as a uint8 tensor (3, H, W), stored channels-last. Grey becomes RGB, transparency is dropped.

    Raises DecodeError for what is empty, broken, animated, or larger than `max_pixels`.
    """
    if not data:
        raise DecodeError("empty image")
    pixels_HWC = _decode_jpeg(data, max_pixels) if simplejpeg.is_jpeg(data) else None
    if pixels_HWC is None:
        pixels_HWC = _decode_any(data, max_pixels)
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def decode_view(data: bytes, draw: Callable[[int, int], View], config: DataConfig, out_CHW: NDArray[np.uint8]) -> View:
    """Writes the pixels of a `resized` view to `out_CHW`: those that `box_pixels` makes of its box in decode_rgb(data).

    `draw(height, width)` gives the view of an image of that size. Raises DecodeError as decode_rgb does.
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
    except ValueError:
        return None
    return pixels_HWC


def _jpeg_size(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Height and width, or None for a JPEG that is left to Pillow."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(height, width, max_pixels)
    return None if colorspace in ("CMYK", "YCCK") else (height, width)


def _decode_any(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """RGB pixels (H, W, 3) by Pillow."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.height, image.width, max_pixels)
            if image.format != "JPEG" and getattr(image, "is_animated", False):
                raise DecodeError("animated image")
            return _to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(f"larger than {max_pixels} pixels") from error
    except (OSError, SyntaxError, EOFError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        # What Pillow's parsers raise on damaged files; its documentation promises OSError only.
        if isinstance(error, DecodeError):
            raise
        raise DecodeError(f"not a readable image: {str(error).partition(' <')[0] or type(error).__name__}") from error


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I;16"):
        grey_HW = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey_HW[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise DecodeError(f"pixels of mode {image.mode} have no fixed range; 8 or 16 bits are expected")
    if image.mode == "P":
        # A palette with transparency converts to RGB without a warning only by way of RGBA.
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise DecodeError(f"image of {width} x {height} pixels")
    if height * width > max_pixels:
        raise DecodeError(f"image of {width} x {height} pixels, larger than the limit of {max_pixels}")
