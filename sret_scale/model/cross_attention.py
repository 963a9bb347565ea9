"""What the tokens of a stage see: parts of the stream, and a memory beside it, of S tokens. Others as in `layers`."""

from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sret_scale.model.config import StageConfig
from sret_scale.model.operations import operations
from sret_scale.model.operations.fused import NORM_EPS
from sret_scale.model.stored_sizes import Sizes


class Sight(NamedTuple):
    """What the tokens of a stage see, where that is not all of their slice; True is seen.

    mask, memory_mask: (B, 1, N, N) of the stream and (B, 1, N, S) of the memory; None shows all.
    memory: keys and values (B, H, S, K), of one block or of all of a stage in turn; or (B, S, D) alone, from which a
        stage makes them.
    """

    mask: Tensor | None = None
    memory: tuple[Tensor, ...] = ()
    memory_mask: Tensor | None = None


class CrossAttention(nn.Module):
    """Attention of a stream to a memory, with its norm. Keys and values come from outside (`Sight`): the memory is the
    same in every loop, and so are they."""

    def __init__(self, stage: StageConfig, sizes: Sizes) -> None:
        super().__init__()
        self.num_heads = stage.num_heads
        self.norm = nn.LayerNorm(stage.width, eps=NORM_EPS)
        self.query, self.out = (nn.Linear(sizes.width, sizes.width) for _ in range(2))

    def forward(self, x_BND: Tensor, sight: Sight, coefficients: dict[str, Tensor | None]) -> Tensor:
        """The stream after the sub-layer; coefficients: of its residual."""
        norm, query, out = self.norm, self.query, self.out
        query_BND = operations().norm_linear(x_BND, norm.weight, norm.bias, query.weight, query.bias)
        heads = rearrange(query_BND, "b n (h k) -> b h n k", h=self.num_heads)
        key, value = sight.memory
        mixed = F.scaled_dot_product_attention(heads, key, value, attn_mask=sight.memory_mask)
        mixed_BND = rearrange(mixed, "b h n k -> b n (h k)")
        return operations().project_residual(x_BND, mixed_BND, out.weight, out.bias, **coefficients)
