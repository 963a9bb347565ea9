"""A recursive encoder and decoder: tokens of a sentence in, what each next token of its translation costs out.

Several pairs share a row. An input is (R, 4, M): tokens of the sources, the number of the pair that each belongs to,
tokens of the targets, and their numbers; 0 is no pair. Every target begins with token 0, which is also what follows its
last one. Shape letters as in `layers`; R rows, M is N + 1, and S is N, the tokens of the source.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sret_scale.model.cross_attention import Sight
from sret_scale.model.depth_plan import DepthPlan
from sret_scale.model.noise import Noise
from sret_scale.model.operations.fused import NORM_EPS
from sret_scale.model.text.text_config import TranslationConfig
from sret_scale.model.text.token_model import TokenModel


class Embedded(NamedTuple):
    """Both sides of a batch, (R, S, D) and (R, N, D), as they go into their first stages, and what their tokens see."""

    source: Tensor
    source_sight: Sight
    target: Tensor
    target_sight: Sight


class Translator(TokenModel):
    """Rows of pairs to nats (R, N) of the target's tokens; those of places without a pair mean nothing."""

    config: TranslationConfig

    def __init__(self, config: TranslationConfig) -> None:
        super().__init__(config, 2, config.context)
        self.memory_norm = nn.LayerNorm(config.stages[0].width, eps=NORM_EPS)

    def next_tokens(self, inputs_R4M: Tensor) -> Tensor:
        """(R, N) of the targets."""
        return inputs_R4M[:, 2, 1:]

    def forward_stem(self, inputs_R4M: Tensor, noise: Noise | None = None) -> Embedded:
        """Both sides, positions added. ValueError for more tokens than the context."""
        num_tokens = inputs_R4M.shape[2] - 1
        if num_tokens > self.config.context:
            raise ValueError(f"this model takes rows of 1 + {self.config.context} tokens at most, got 1 + {num_tokens}")
        source_RS, source_pair_RS, target_RN, target_pair_RN = inputs_R4M[..., :-1].unbind(1)
        of_source, of_target = source_pair_RS[:, None, None], target_pair_RN[:, None, :, None]
        is_earlier_NN = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=inputs_R4M.device).tril()
        return Embedded(
            self.dropped(self.embedded(0, source_RS, place_in_pair(source_pair_RS)), noise, 0),
            Sight(mask=source_pair_RS[:, None, :, None] == of_source),
            self.dropped(self.embedded(1, target_RN, place_in_pair(target_pair_RN)), noise, 1),
            # Who belongs to no pair sees all: a token that saw nothing would give no number, and spread it.
            Sight(
                mask=(of_target == target_pair_RN[:, None, None]) & is_earlier_NN,
                memory_mask=(of_target == of_source) | (of_target == 0),
            ),
        )

    def embedded(self, side: int, tokens: Tensor, places: Tensor) -> Tensor:
        """(..., D) of tokens of the source (0) or of the target (1), with their positions."""
        return self.stem(tokens) + self.position[side][places]

    def memory(self, source_RSD: Tensor, sight: Sight, noise: Noise | None, plan: DepthPlan | None) -> Tensor:
        """(R, S, D) what the encoder gives."""
        for stage in self.stages[: self.config.encoder_stages]:
            source_RSD = stage(source_RSD, noise, plan, sight)
        return self.memory_norm(source_RSD)

    def planned_outputs(self, first: Embedded, noise: Noise | None, plan: DepthPlan | None) -> Iterator[Tensor]:
        """See `TokenModel.planned_outputs`."""
        memory_RSD = self.memory(first.source, first.source_sight, noise, plan)
        sight = first.target_sight._replace(memory=(memory_RSD,))
        return self.through(self.stages[self.config.encoder_stages :], first.target, noise, plan, sight)


def place_in_pair(pair_RN: Tensor) -> Tensor:
    """(R, N) how many tokens of the same pair lie before each, in a row where those of a pair lie together."""
    place_N = torch.arange(pair_RN.shape[1], device=pair_RN.device)
    is_first_RN = torch.ones_like(pair_RN, dtype=torch.bool)
    is_first_RN[:, 1:] = pair_RN[:, 1:] != pair_RN[:, :-1]
    return place_N - (place_N * is_first_RN).cummax(dim=1).values
