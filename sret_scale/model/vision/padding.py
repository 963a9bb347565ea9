"""Weights between the published sizes and padded storage (`sizes`), by parameter name.

Why zeros stay zero: a padded channel of the stream is 0 and gets gradient 0, since every norm and the head look at the
real channels alone. A padded hidden channel has zero weights on both sides, so its value, GELU(0) and its gradient are
0; a padded channel of a head likewise, as queries times keys and weights times values. Gradients of padded weights are
products with one of these. An optimiser that keeps a zero with gradient 0 at 0 (SGD, Adam, AdamW, LAMB) does the rest.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sret_scale.model.config import SReTConfig


def padded_state(config: SReTConfig, state: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored state dict of one in published sizes; `like` has its shapes. Padding is 0, of variances 1."""
    stored = {}
    for name, value in state.items():
        shape = like[name].shape
        if shape == value.shape:
            stored[name] = value
            continue
        for dim in range(value.ndim):
            value = _padded_dim(value, dim, shape[dim], _chunks(config, name, dim), float(name.endswith("running_var")))
        stored[name] = value
    return stored


def unpadded_state(config: SReTConfig, state: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `padded_state`; ValueError if padding holds anything but what it put there."""
    published = {}
    for name, value in state.items():
        small = value
        for dim, size in enumerate(like[name].shape):
            chunks = _chunks(config, name, dim)
            small = _in_chunks(small, dim, chunks).narrow(dim + 1, 0, size // chunks).flatten(dim, dim + 1)
        published[name] = small.contiguous()
    again = padded_state(config, published, state)
    wrong = [
        name
        for name, value in state.items()
        if not name.endswith(("running_mean", "running_var")) and not torch.equal(again[name], value)
    ]
    if wrong:
        raise ValueError(f"padding of {wrong[0]} is not zero ({len(wrong)} tensors): the weights are damaged")
    return published


def unpadded_config(config: SReTConfig) -> SReTConfig:
    """The same model in published sizes."""
    return replace(config, padded=False)


def _padded_dim(value: Tensor, dim: int, size: int, chunks: int, fill: float) -> Tensor:
    if value.shape[dim] == size:
        return value
    parts = _in_chunks(value, dim, chunks)
    shape = list(parts.shape)
    shape[dim + 1] = size // chunks - shape[dim + 1]
    return torch.cat([parts, parts.new_full(shape, fill)], dim=dim + 1).flatten(dim, dim + 1)


def _in_chunks(value: Tensor, dim: int, chunks: int) -> Tensor:
    return value.reshape(*value.shape[:dim], chunks, -1, *value.shape[dim + 1 :])


def _chunks(config: SReTConfig, name: str, dim: int) -> int:
    """How many equal parts of a dimension are padded each on its own: heads are."""
    parts = name.split(".")
    if parts[0] != "stages":
        return 1
    num_heads = config.stages[int(parts[1])].num_heads
    if (".attention.qkv." in name and dim == 0) or (name.endswith("up_qkv") and dim == 1):
        return 3 * num_heads
    return num_heads if name.endswith("attention.out.weight") and dim == 1 else 1
