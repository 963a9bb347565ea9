"""A decoder-only recursive language model over bytes: embedding and positions, causal stages, the embedding as head.

A row is a byte that stands for the beginning, 0, and the bytes of a window behind it. Shape letters as in `layers`;
M is N + 1, the bytes of a row, and V the 256 bytes that there are.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sret_scale.model.depth_plan import DepthPlan
from sret_scale.model.noise import Dropout, Noise
from sret_scale.model.operations.fused import NORM_EPS
from sret_scale.model.stack import StackModel
from sret_scale.model.stage import Stage
from sret_scale.model.text.text_config import NUM_BYTES, TextConfig

CHUNK_TOKENS = 2048
"""Of so many tokens at a time there are scores: of a micro-batch they would be the largest tensor of a step."""


class NextByte(StackModel):
    """Rows of bytes to the nats that each next byte costs. Positions are added once, and travel with their tokens."""

    config: TextConfig
    stem: nn.Embedding

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        width = config.stages[0].width
        self.stem = nn.Embedding(NUM_BYTES, width)
        self.position = nn.Parameter(torch.empty(config.context, width))
        self.stages = nn.ModuleList(Stage(config, index) for index in range(len(config.stages)))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        # The embedding's weights, which have one name alone: under two, DeepSpeed's checkpoints would lose one.
        self.head = nn.Identity()
        nn.init.normal_(self.stem.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)

    def forward(
        self, inputs_BM: Tensor, noise: Noise | None = None, plans: Sequence[DepthPlan] | None = None
    ) -> Tensor:
        """(B, N) nats of every byte of a row but the first, each from those before it; with plans (K, B, N)."""
        first_BND, next_BN = self.forward_stem(inputs_BM, noise), inputs_BM[:, 1:]
        ways: Sequence[DepthPlan | None] = [None] if plans is None else plans
        outputs = (output_BND for plan in ways for output_BND in self.planned_outputs(first_BND, noise, plan))
        nats = [self._nats(output_BND, next_BN) for output_BND in outputs]
        return nats[0] if plans is None else torch.stack(nats)

    def forward_features(self, inputs_BM: Tensor, noise: Noise | None = None) -> Tensor:
        """(B, N, D) the stream behind the last stage."""
        *_, last_BND = self.planned_outputs(self.forward_stem(inputs_BM, noise), noise, None)
        return last_BND

    def forward_stem(self, inputs_BM: Tensor, noise: Noise | None = None) -> Tensor:
        """(B, N, D) of all bytes of a row but the last, positions added. ValueError for more than the context."""
        num_tokens = inputs_BM.shape[1] - 1
        if num_tokens != self.config.context:
            raise ValueError(f"this model takes rows of 1 + {self.config.context} bytes, got 1 + {num_tokens}")
        x_BND = self.stem(inputs_BM[:, :-1]) + self.position
        if self.training and noise is not None and self.config.dropout:
            x_BND = x_BND * Dropout(self.config.dropout, (noise.sample_seed,)).masks(x_BND)(x_BND.shape)
        return x_BND

    def planned_outputs(self, first: Tensor, noise: Noise | None, plan: DepthPlan | None) -> Iterator[Tensor]:
        """(B, N, D) behind the last stage, at the plan's supervised loop counts and at its end."""
        x_BND = first
        *stages, last = (cast(Stage, stage) for stage in self.stages)
        for stage in stages:
            x_BND = stage(x_BND, noise, plan)
        if plan is None:
            # As a call, around which ZeRO 3 gathers the stage's weights.
            yield last(x_BND, noise)
        else:
            yield from last.outputs(x_BND, noise, plan, plan.supervised)

    def forward_head(self, features_BND: Tensor) -> Tensor:
        """(B, N, V) scores of the next byte behind each token."""
        return F.linear(self.head(self.norm(features_BND)), self.stem.weight)

    def _nats(self, features_BND: Tensor, next_BN: Tensor) -> Tensor:
        def of_chunk(features_TD: Tensor, next_T: Tensor) -> Tensor:
            scores_TV = self.forward_head(features_TD)
            exact_TV = scores_TV.to(torch.promote_types(scores_TV.dtype, torch.float32))
            return F.cross_entropy(exact_TV, next_T, reduction="none")

        tokens = features_BND.flatten(0, 1), next_BN.flatten()
        chunks = zip(*(torch.split(part, CHUNK_TOKENS) for part in tokens), strict=True)
        # Scores are computed again in the backward pass.
        nats = [checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        return torch.cat(nats).view_as(next_BN)
