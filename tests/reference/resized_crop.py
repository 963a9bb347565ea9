"""The training view by Pillow: crop, then its antialiased resize, then flip."""

from typing import Any

import numpy as np
from PIL import Image

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def resized_crop(
    pixels_HWC: np.ndarray[Any, Any], view: tuple[int, int, int, int, int], image_size: int, interpolation: str
) -> np.ndarray[Any, Any]:
    top, left, height, width, flip = view
    box = Image.fromarray(pixels_HWC).crop((left, top, left + width, top + height))
    resized = box.resize((image_size, image_size), FILTERS[interpolation])
    if flip:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(resized)
