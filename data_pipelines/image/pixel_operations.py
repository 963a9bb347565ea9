"""Operations on batches of uint8 images, each image with a strength of its own, on the images' device.

Each is torchvision's v2 operation on one image, within a grey level; geometry is bilinear. The host draws what happens
to which image (`policies`), so it knows the groups and waits for nothing. Shapes: N images of a group, C channels (3),
H height, W width.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.image.upload import uploaded

Strengths = NDArray[np.float64]
GREY = (0.2989, 0.587, 0.114)
BLUR_REACH = 6
"""Pixels to each side that a blur looks at: three deviations at its strongest, 2 pixels."""


def apply_operations_(images_BCHW: Tensor, names: Sequence[str], strengths_B: Strengths, fill: Sequence[int]) -> None:
    """Changes each image by one operation, `identity` among them, in its memory.

    fill: the colour beyond the edges of an image.
    """
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name != "identity":
            # One grid serves all that move pixels.
            groups.setdefault("geometry" if name in MATRICES else name, []).append(row)
    # On a CPU image after image: the floats of a group are fresh memory, which costs more than the arithmetic.
    step = 1 if images_BCHW.device.type == "cpu" else len(names)
    for name, rows in groups.items():
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            index_N = uploaded(torch.tensor(part), images_BCHW.device)
            group_NCHW = images_BCHW.index_select(0, index_N)
            changed_NCHW = _changed(group_NCHW, name, [names[row] for row in part], strengths_B[part], fill)
            images_BCHW.index_copy_(0, index_N, changed_NCHW)


def _changed(
    images_NCHW: Tensor, group: str, names: Sequence[str], strengths_N: Strengths, fill: Sequence[int]
) -> Tensor:
    device = images_NCHW.device
    if group == "geometry":
        pairs = zip(names, strengths_N.tolist(), strict=True)
        matrices = [MATRICES[name](strength, *images_NCHW.shape[-2:]) for name, strength in pairs]
        return moved(images_NCHW, uploaded(torch.tensor(matrices), device), fill)
    strengths = uploaded(torch.from_numpy(strengths_N.astype(np.float32)), device)
    return OPERATIONS[group](images_NCHW, strengths.view(-1, 1, 1, 1))


Matrix = Callable[[float, int, int], list[list[float]]]
# From a place in the result to the place in the image, in pixels from its centre; strength, height, width.
MATRICES: dict[str, Matrix] = {
    "shear_x": lambda s, height, width: [[1.0, s, s * height / 2], [0.0, 1.0, 0.0]],
    "shear_y": lambda s, height, width: [[1.0, 0.0, 0.0], [s, 1.0, s * width / 2]],
    "translate_x": lambda s, height, width: [[1.0, 0.0, -s], [0.0, 1.0, 0.0]],
    "translate_y": lambda s, height, width: [[1.0, 0.0, 0.0], [0.0, 1.0, -s]],
    "rotate": lambda s, height, width: [
        [float(np.cos(np.radians(s))), -float(np.sin(np.radians(s))), 0.0],
        [float(np.sin(np.radians(s))), float(np.cos(np.radians(s))), 0.0],
    ],
}


def moved(images_NCHW: Tensor, matrices_N23: Tensor, fill: Sequence[int]) -> Tensor:
    """Each pixel from where its matrix says."""
    # Sums of a column and a row: the product of `affine_grid` takes twice as long as the sampling.
    grid_NHW2 = images_NCHW.new_empty((len(images_NCHW), *images_NCHW.shape[2:], 2), dtype=torch.float32)
    height, width = images_NCHW.shape[2:]
    y_H1, x_W = (torch.arange(size, device=grid_NHW2.device) + (1 - size) / 2 for size in (height, width))
    y_H1 = y_H1[:, None]
    for axis, size in enumerate((width, height)):
        x_N11, y_N11, shift_N11 = (matrices_N23[:, axis] * (2 / size))[..., None, None].unbind(1)
        torch.add(x_N11 * x_W + shift_N11, y_N11 * y_H1, out=grid_NHW2[..., axis])
    # Beyond the edges lie zeros, which stand for the colour.
    fill_C11 = uploaded(torch.tensor(fill, dtype=torch.float32), images_NCHW.device)[:, None, None]
    pixels_NCHW = F.grid_sample(images_NCHW.float().sub_(fill_C11), grid_NHW2, align_corners=False)
    return pixels_NCHW.add_(fill_C11).round_().to(torch.uint8)


def grey(images_NCHW: Tensor) -> Tensor:
    """(N, 1, H, W) whole numbers as float32."""
    red, green, blue = images_NCHW.float().unbind(1)
    return red.mul_(GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2]).floor_().unsqueeze(1)


def _blended(images_NCHW: Tensor, other_NCHW: Tensor | float, ratio_N111: Tensor) -> Tensor:
    """`ratio` parts of the images, the rest of the other."""
    return images_NCHW.mul(ratio_N111).add_(other_NCHW * (1.0 - ratio_N111)).clamp_(0, 255).to(torch.uint8)


def _contrast(images_NCHW: Tensor, ratio_N111: Tensor) -> Tensor:
    return _blended(images_NCHW, grey(images_NCHW).mean(dim=(1, 2, 3), keepdim=True), ratio_N111)


def _sharpness(images_NCHW: Tensor, ratio_N111: Tensor) -> Tensor:
    """Away from, or towards, the mean of the neighbours, in which a pixel itself counts five times. Edges stay."""
    pixels_NCHW = images_NCHW.float()
    inner_NCHW = pixels_NCHW[..., 1:-1, 1:-1]
    # By sums of rows and columns: fifteen times as fast on a CPU as a pooling.
    sums_NCHW = _window_sum(_window_sum(pixels_NCHW, [1.0] * 3, 2), [1.0] * 3, 3)
    smooth_NCHW = sums_NCHW.add_(inner_NCHW, alpha=4.0).div_(13.0).round_()
    inner_NCHW.lerp_(smooth_NCHW, 1.0 - ratio_N111)
    return pixels_NCHW.clamp_(0, 255).to(torch.uint8)


def _posterize(images_NCHW: Tensor, bits_N111: Tensor) -> Tensor:
    return images_NCHW & (256.0 - torch.exp2(8.0 - bits_N111)).to(torch.uint8)


def _solarize(images_NCHW: Tensor, threshold_N111: Tensor) -> Tensor:
    # 255, which is -1, where it is reached: the difference of bits is the inverse. A threshold of 256 is beyond uint8.
    reached_NCHW = images_NCHW >= threshold_N111.ceil().to(torch.int16)
    return images_NCHW ^ reached_NCHW.view(torch.uint8).neg_()


def _solarize_add(images_NCHW: Tensor, added_N111: Tensor) -> Tensor:
    """The dark half brighter by at most 127."""
    return torch.where(images_NCHW < 128, images_NCHW + added_N111.to(torch.uint8), images_NCHW)


def _autocontrast(images_NCHW: Tensor, _: Tensor) -> Tensor:
    low_NC11, high_NC11 = (
        extreme.float() for extreme in (images_NCHW.amin((2, 3), True), images_NCHW.amax((2, 3), True))
    )
    span_NC11 = high_NC11 - low_NC11
    is_flat_NC11 = span_NC11 == 0
    scale_NC11 = torch.where(is_flat_NC11, 1.0, 255.0 / span_NC11)
    low_NC11 = torch.where(is_flat_NC11, 0.0, low_NC11)
    # A hundredth, as a division that comes out whole may not as a product.
    return images_NCHW.sub(low_NC11).mul_(scale_NC11).add_(0.01).to(torch.uint8)


def _equalize(images_NCHW: Tensor, _: Tensor) -> Tensor:
    """Pillow's table for each channel."""
    pixels_NCP = images_NCHW.flatten(2).long()
    counts_NCV = torch.zeros((*pixels_NCP.shape[:2], 256), dtype=torch.int64, device=pixels_NCP.device)
    counts_NCV.scatter_add_(2, pixels_NCP, torch.ones_like(pixels_NCP[:1, :1, :1]).expand_as(pixels_NCP))
    sums_NCV = counts_NCV.cumsum(2)
    step_NC1 = (pixels_NCP.shape[2] - counts_NCV.gather(2, sums_NCV.argmax(2, keepdim=True))) // 255
    table_NCV = F.pad((sums_NCV[..., :-1] + step_NC1 // 2) // step_NC1.clamp(min=1), (1, 0)).clamp_(0, 255)
    table_NCV = torch.where(step_NC1 == 0, torch.arange(256, device=table_NCV.device), table_NCV).to(torch.uint8)
    return table_NCV.gather(2, pixels_NCP).view_as(images_NCHW)


def _blur(images_NCHW: Tensor, sigma_N111: Tensor) -> Tensor:
    """A Gaussian of a deviation in pixels; beyond the edges lies the mirror image."""
    places_K = torch.arange(-BLUR_REACH, BLUR_REACH + 1, device=images_NCHW.device)
    kernel_NK11 = torch.exp(-0.5 * (places_K.view(-1, 1, 1) / sigma_N111).square())
    weights = (kernel_NK11 / kernel_NK11.sum(1, keepdim=True)).unsqueeze(2).unbind(1)
    pixels_NCHW = F.pad(images_NCHW.float(), (BLUR_REACH,) * 4, mode="reflect")
    pixels_NCHW = _window_sum(_window_sum(pixels_NCHW, weights, 2), weights, 3)
    return pixels_NCHW.round_().clamp_(0, 255).to(torch.uint8)


def _window_sum(pixels_NCHW: Tensor, weights: Sequence[float | Tensor], dim: int) -> Tensor:
    """Weighted sums of neighbours along a dimension, where all of them are there."""
    length = pixels_NCHW.shape[dim] - len(weights) + 1
    result_NCHW = pixels_NCHW.narrow(dim, 0, length) * weights[0]
    for place, weight in enumerate(weights[1:], 1):
        result_NCHW += pixels_NCHW.narrow(dim, place, length) * weight
    return result_NCHW


# The second argument is (N, 1, 1, 1).
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": lambda images, ratio: _blended(images, 0.0, ratio),
    "color": lambda images, ratio: _blended(images, grey(images), ratio),
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "grey": lambda images, _: grey(images).to(torch.uint8).expand_as(images),
    "blur": _blur,
}
