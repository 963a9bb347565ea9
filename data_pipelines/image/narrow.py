"""Part of an image that is enlarged, without the rest: a line of 60,000 pixels becomes one of 15 million.

The arithmetic is that of torch's uint8 kernel (and of native/roi_axis.c): weights of Pillow's filters, rounded to 16
bits with a precision that all places share, exact sums.
"""

import numpy as np
from numpy.typing import NDArray

# Places at either end of the axis that are asked for the largest weight: all of them, up to twice as many.
_ASKED = 2**18


def enlarged_part(
    image_CHW: NDArray[np.uint8], size: tuple[int, int], at: tuple[int, int], side: int, interpolation: str
) -> NDArray[np.uint8]:
    """(C, side, side): what stands at `at` (top, left) of the image enlarged to `size` (height, width)."""
    (rows, down), (columns, across) = (
        _fixed(image_CHW.shape[axis + 1], size[axis], at[axis], side, interpolation) for axis in (0, 1)
    )
    # Across goes first, and is rounded, in the rows that are needed.
    needed_CHW = image_CHW[:, rows.min() : rows.max() + 1]
    across_CHW = _weighed(needed_CHW, columns, *across)
    return _weighed(across_CHW.transpose(0, 2, 1), rows - rows.min(), *down).transpose(0, 2, 1)


def _weighed(
    pixels: NDArray[np.uint8], taps: NDArray[np.int64], weights: NDArray[np.int32], precision: int
) -> NDArray[np.uint8]:
    """Sums over the last axis of `pixels`, as bytes."""
    sums = (pixels[..., taps] * weights).sum(-1) + (1 << (precision - 1))
    result: NDArray[np.uint8] = np.clip(sums >> precision, 0, 255).astype(np.uint8)
    return result


def _fixed(
    num_pixels: int, num_places: int, start: int, length: int, interpolation: str
) -> tuple[NDArray[np.int64], tuple[NDArray[np.int32], int]]:
    """The pixels that each place weighs; their weights in fixed point, and its precision."""
    asked = min(_ASKED, num_places)
    largest = max(
        float(_weights(np.arange(asked) + first, num_pixels, num_places, interpolation)[1].max())
        for first in (0, num_places - asked)
    )
    precision = 0
    while precision < 22 and int(0.5 + largest * 2 ** (precision + 1)) < 2**15:
        precision += 1
    taps, exact = _weights(np.arange(start, start + length), num_pixels, num_places, interpolation)
    weights = np.trunc(exact * 2**precision + np.where(exact < 0, -0.5, 0.5)).astype(np.int32)
    return taps, (weights, precision)


def _weights(
    places: NDArray[np.int64], num_pixels: int, num_places: int, interpolation: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The pixels that each place weighs, and their weights: (places, taps) both."""
    scale, support = num_pixels / num_places, 2 if interpolation == "bicubic" else 1
    centre = scale * (places + 0.5)
    first = np.maximum(centre - support + 0.5, 0).astype(np.int64)
    end = np.minimum((centre + support + 0.5).astype(np.int64), num_pixels)
    taps = first[:, None] + np.arange(2 * support + 1)
    x = np.abs(taps - centre[:, None] + 0.5)
    weights = _keys(x) if interpolation == "bicubic" else np.maximum(1 - x, 0)
    weights[taps >= end[:, None]] = 0
    return np.minimum(taps, num_pixels - 1), weights / weights.sum(1, keepdims=True)


def _keys(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic with a = -0.5."""
    a = -0.5
    far = np.where(x < 2, ((x - 5) * x + 8) * x * a - 4 * a, 0)
    return np.where(x < 1, ((a + 2) * x - (a + 3)) * x * x + 1, far)
