"""A decoder-only recursive language model over bytes: embedding and positions, causal stages, the embedding as head.

A row is a byte that stands for the beginning, 0, and the bytes of a window behind it. Shape letters as in `layers`;
M is N + 1, the bytes of a row.
"""

from collections.abc import Iterator

from torch import Tensor

from sret_scale.model.depth_plan import DepthPlan
from sret_scale.model.noise import Noise
from sret_scale.model.text.text_config import TextConfig
from sret_scale.model.text.token_model import TokenModel


class NextByte(TokenModel):
    """Rows of bytes to the nats that each next byte costs. Positions are added once, and travel with their tokens."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config, config.context)

    def next_tokens(self, inputs_BM: Tensor) -> Tensor:
        """(B, N) the bytes of a row but the first."""
        return inputs_BM[:, 1:]

    def forward_stem(self, inputs_BM: Tensor, noise: Noise | None = None) -> Tensor:
        """(B, N, D) of all bytes of a row but the last, positions added. ValueError for more than the context."""
        num_tokens = inputs_BM.shape[1] - 1
        if num_tokens != self.config.context:
            raise ValueError(f"this model takes rows of 1 + {self.config.context} bytes, got 1 + {num_tokens}")
        return self.dropped(self.stem(inputs_BM[:, :-1]) + self.position, noise)

    def planned_outputs(self, first_BND: Tensor, noise: Noise | None, plan: DepthPlan | None) -> Iterator[Tensor]:
        """See `TokenModel.planned_outputs`."""
        return self.through(self.stages, first_BND, noise, plan, None)
