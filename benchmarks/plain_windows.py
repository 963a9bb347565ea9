"""The plain twin of windows: each square of the image by itself, without padding, and the cone that follows."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sret_scale.model.layers import Attention


def window_slices(grid: int, window: int, application: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each window in the number `application` of a stage; every second one is shifted."""
    shift = window // 2 if application % 2 else 0
    parts = [slice(max(0, start), min(grid, start + window)) for start in range(-shift, grid, window)]
    parts = [part for part in parts if part.stop > part.start]
    return ((rows, columns) for rows in parts for columns in parts)


def attend_in_windows(attention: Attention, qkv_BNC: Tensor, window: int, application: int) -> Tensor:
    """(B, N, D) softmax attention of each window, with the learned bias of each pair's offset."""
    batch, num_tokens, channels = qkv_BNC.shape
    grid, heads = round(num_tokens**0.5), attention.num_heads
    out_BHWD = qkv_BNC.new_empty(batch, grid, grid, channels // 3)
    for rows, columns in window_slices(grid, window, application):
        part = qkv_BNC.reshape(batch, grid, grid, channels)[:, rows, columns].flatten(1, 2)
        query, key, value = part.reshape(batch, -1, 3, heads, channels // 3 // heads).permute(2, 0, 3, 1, 4)
        places = [(row, column) for row in range(grid)[rows] for column in range(grid)[columns]]
        # The offset of a query's place from a key's, counted from the smallest.
        offsets = [
            [(a[0] - b[0] + window - 1) * (2 * window - 1) + a[1] - b[1] + window - 1 for b in places] for a in places
        ]
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + attention.offsets[:, torch.tensor(offsets)]
        mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        out_BHWD[:, rows, columns] = mixed.reshape(batch, rows.stop - rows.start, columns.stop - columns.start, -1)
    return out_BHWD.flatten(1, 2)


def cone(grid: int, window: int, pixel: tuple[int, int], num_applications: int) -> Tensor:
    """(grid, grid) bool: which tokens can know of the pixel after so many applications."""
    known = torch.zeros(grid, grid, dtype=torch.bool)
    known[pixel] = True
    for application in range(num_applications):
        for rows, columns in window_slices(grid, window, application):
            known[rows, columns] |= known[rows, columns].any()
    return known
