"""Stages that read tokens once, with the keys and values of earlier ones kept; for stages that are not sliced."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_scale.model.cross_attention import Sight

CachePolicy = Literal["each", "last", "first"]
"""Whose keys and values of earlier tokens an application attends to. Applications of one block in different loops have
different inputs: with "each" every one has its own, which to rounding is what whole passes give. "last" shows in every
loop those that the block's last one made of earlier tokens, beside the token's own (others say terminal); "first" those
of loop 0, of the token itself too. Both hold one set for a block, and not one for each of its loops, and compute
something else than the model was trained to."""


class KeptKeys:
    """Reads rows of tokens piece by piece; `num_read` of them so far. Every token sees all before it."""

    def __init__(self, stages: Iterable[nn.Module], policy: CachePolicy = "each") -> None:
        self._stages: list[Any] = list(stages)
        self._policy, self.num_read = policy, 0
        self._loops = [stage.config.stages[stage.index].num_loops for stage in self._stages]
        # By number of block and loop, or by block alone: keys and values (B, heads, tokens read, head width).
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._done: list[int] = []

    def read(self, x_BND: Tensor, sights: Sequence[Sight] | None = None) -> Tensor:
        """(B, N, D) what the last stage gives for tokens behind those that were read. sights: of every stage."""
        assert self.num_read == 0 or x_BND.shape[1] == 1, "the mask of a later piece would be another one"
        if self._policy == "last" and x_BND.shape[1] > 1 and max(self._loops) > 1:
            # The first loop of a token waits for the last one of those before it.
            tokens = (x_BND[:, place : place + 1] for place in range(x_BND.shape[1]))
            return torch.cat([self.read(token_B1D, sights) for token_B1D in tokens], dim=1)
        blocks = [
            (block.attention, loops)
            for stage, loops in zip(self._stages, self._loops, strict=True)
            for block in stage.blocks
        ]
        self._done = [0] * len(blocks)
        seen: list[Sight | None] = [None] * len(self._stages) if sights is None else list(sights)
        try:
            for number, (attention, loops) in enumerate(blocks):
                attention.attend = partial(self._attend, number, loops - 1, attention.head_width**-0.5)
            for stage, sight in zip(self._stages, seen, strict=True):
                x_BND = stage(x_BND, sight=sight)
        finally:
            for attention, _ in blocks:
                del attention.attend
        self.num_read += x_BND.shape[1]
        return x_BND

    def select(self, rows: Tensor) -> None:
        """From now on row i is what row rows[i] was."""
        self._kept = {place: (key[rows], value[rows]) for place, (key, value) in self._kept.items()}

    def _attend(
        self, block: int, last: int, scale: float, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        loop = self._done[block]
        self._done[block] += 1
        place = block, loop if self._policy == "each" else 0
        if self._policy == "first" and loop:
            key, value = self._kept[place]
        elif place in self._kept:
            key, value = (torch.cat(both, dim=2) for both in zip(self._kept[place], (key, value), strict=True))
        if self._policy != "last" or loop == last:
            self._kept[place] = key, value
        return F.scaled_dot_product_attention(query, key, value, is_causal=not self.num_read, scale=scale)
