"""Stages that read tokens once, with the keys and values of earlier ones kept.

Applications of one block in different loops have different inputs, so each keeps its own (the policy that others call
`each`): what comes out is to rounding what whole passes would give. For stages that are not sliced.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_scale.model.cross_attention import Sight


class KeptKeys:
    """Reads rows of tokens piece by piece; `num_read` of them so far. Every token sees all before it."""

    def __init__(self, stages: Iterable[nn.Module]) -> None:
        self._stages: list[Any] = list(stages)
        self.num_read = 0
        # Of every application in the order in which they run: keys and values (B, heads, tokens read, head width).
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._number = 0

    def read(self, x_BND: Tensor, sights: Iterable[Sight] | None = None) -> Tensor:
        """(B, N, D) what the last stage gives for tokens behind those that were read. sights: of every stage."""
        assert self.num_read == 0 or x_BND.shape[1] == 1, "the mask of a later piece would be another one"
        attentions = [block.attention for stage in self._stages for block in stage.blocks]
        num_tokens, self._number = x_BND.shape[1], 0
        seen: list[Sight | None] = [None] * len(self._stages) if sights is None else list(sights)
        try:
            for attention in attentions:
                attention.attend = partial(self._attend, attention.head_width**-0.5)
            for stage, sight in zip(self._stages, seen, strict=True):
                x_BND = stage(x_BND, sight=sight)
        finally:
            for attention in attentions:
                del attention.attend
        self.num_read += num_tokens
        return x_BND

    def select(self, rows: Tensor) -> None:
        """From now on row i is what row rows[i] was."""
        self._kept = [(key[rows], value[rows]) for key, value in self._kept]

    def _attend(self, scale: float, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if self.num_read:
            before_key, before_value = self._kept[self._number]
            key, value = torch.cat([before_key, key], dim=2), torch.cat([before_value, value], dim=2)
            self._kept[self._number] = key, value
        else:
            self._kept.append((key, value))
        self._number += 1
        return F.scaled_dot_product_attention(query, key, value, is_causal=not self.num_read, scale=scale)
