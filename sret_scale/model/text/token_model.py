"""What models of text share: rows of tokens to the nats that each next token costs, and the embedding as head.

Shape letters as in `layers`; V is the number of different tokens, T those of a chunk.
"""

import abc
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sret_scale.model.cross_attention import Sight
from sret_scale.model.depth_plan import DepthPlan
from sret_scale.model.noise import Dropout, Noise
from sret_scale.model.operations.fused import NORM_EPS
from sret_scale.model.stack import StackModel
from sret_scale.model.stage import Stage
from sret_scale.model.text.text_config import TextConfig

CHUNK_TOKENS = 2048
"""Of so many tokens at a time there are scores: of a micro-batch they would be the largest tensor of a step."""


class ScaledEmbedding(nn.Embedding):
    """What tokens are as input: their embeddings times the square root of the width (arXiv 1706.03762, section 3.4).

    As a head embeddings are small. As inputs of that size they would soon be hidden by what loops add to all alike.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) of tokens."""
        return super().forward(tokens) * self.embedding_dim**0.5


class TokenModel(StackModel):
    """Stages of one width between an embedding and the same as head."""

    config: TextConfig
    stem: ScaledEmbedding
    label_smoothing = 0.0
    """Of the nats in training (arXiv 1512.00567, section 7); set from outside."""

    def __init__(self, config: TextConfig, *position_shape: int) -> None:
        super().__init__()
        self.config = config
        width = config.stages[0].width
        self.stem = ScaledEmbedding(config.vocabulary, width)
        self.position = nn.Parameter(torch.empty(*position_shape, width))
        self.stages = nn.ModuleList(Stage(config, index) for index in range(len(config.stages)))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        # The embedding's weights, which have one name alone: under two, DeepSpeed's checkpoints would lose one.
        self.head = nn.Identity()
        nn.init.normal_(self.stem.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)

    @abc.abstractmethod
    def next_tokens(self, inputs: Tensor) -> Tensor:
        """(B, N) what follows each token that the model reads."""

    def forward(self, inputs: Tensor, noise: Noise | None = None, plans: Sequence[DepthPlan] | None = None) -> Tensor:
        """(B, N) nats of every next token, from those before it; with plans (K, B, N)."""
        first, next_BN = self.forward_stem(inputs, noise), self.next_tokens(inputs)
        ways: Sequence[DepthPlan | None] = [None] if plans is None else plans
        outputs = (output_BND for plan in ways for output_BND in self.planned_outputs(first, noise, plan))
        nats = [self._nats(output_BND, next_BN) for output_BND in outputs]
        return nats[0] if plans is None else torch.stack(nats)

    def forward_features(self, inputs: Tensor, noise: Noise | None = None) -> Tensor:
        """(B, N, D) the stream behind the last stage."""
        *_, last_BND = self.planned_outputs(self.forward_stem(inputs, noise), noise, None)
        return last_BND

    @abc.abstractmethod
    def planned_outputs(self, first: Any, noise: Noise | None, plan: DepthPlan | None) -> Iterator[Tensor]:
        """(B, N, D) behind the last stage, at the plan's supervised loop counts and at its end."""

    def forward_head(self, features_BND: Tensor) -> Tensor:
        """(B, N, V) scores of the next token behind each."""
        return F.linear(self.head(self.norm(features_BND)), self.stem.weight)

    def dropped(self, x_BND: Tensor, noise: Noise | None, *place: int) -> Tensor:
        """The input of a stage in training, with the dropout of this place."""
        if not self.training or noise is None or not self.config.dropout:
            return x_BND
        return x_BND * Dropout(self.config.dropout, (noise.sample_seed, *place)).masks(x_BND)(x_BND.shape)

    def through(
        self, stages: nn.ModuleList, x_BND: Tensor, noise: Noise | None, plan: DepthPlan | None, sight: Sight | None
    ) -> Iterator[Tensor]:
        """What the last of these stages gives, as `planned_outputs` says."""
        *others, last = (cast(Stage, stage) for stage in stages)
        for stage in others:
            x_BND = stage(x_BND, noise, plan, sight)
        if plan is None:
            # As a call, around which ZeRO 3 gathers the stage's weights.
            yield last(x_BND, noise, None, sight)
        else:
            yield from last.outputs(x_BND, noise, plan, plan.supervised, sight)

    def _nats(self, features_BND: Tensor, next_BN: Tensor) -> Tensor:
        def of_chunk(features_TD: Tensor, next_T: Tensor) -> Tensor:
            scores_TV = self.forward_head(features_TD)
            exact_TV = scores_TV.to(torch.promote_types(scores_TV.dtype, torch.float32))
            smoothing = self.label_smoothing if self.training else 0.0
            return F.cross_entropy(exact_TV, next_T, reduction="none", label_smoothing=smoothing)

        tokens = features_BND.flatten(0, 1), next_BN.flatten()
        chunks = zip(*(torch.split(part, CHUNK_TOKENS) for part in tokens), strict=True)
        # Scores are computed again in the backward pass.
        nats = [checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        return torch.cat(nats).view_as(next_BN)
