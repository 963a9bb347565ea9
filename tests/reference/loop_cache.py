"""What the cache policies of decoding mean: keys and values of all applications are kept, attention is plain."""

from typing import Any

import torch
from torch import Tensor

from sret_scale.model.stage import Stage


def read_by_token(stage: Stage, x_BND: Tensor, policy: str) -> Tensor:
    """(B, N, D) what a causal stage gives, one token after the other."""
    slots, blocks = stage.slots, [block.attention for block in stage.blocks]
    made: list[list[tuple[Tensor, Tensor]]] = [[] for _ in slots]  # of each application, for each token
    running = iter(range(0))  # the numbers of the applications of the token that is read

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        number = next(running)
        made[number].append((key, value))
        ours = [place for place, slot in enumerate(slots) if slot.block == slots[number].block]
        seen = made[{"each": number, "last": ours[-1], "first": ours[0]}[policy]]
        if policy == "last":
            seen = [*seen[: len(made[number]) - 1], (key, value)]
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*seen, strict=True))
        scores = query @ keys.mT / query.shape[-1] ** 0.5
        return scores.softmax(dim=-1) @ values

    for attention in blocks:
        attention.attend = attend
    found = []
    for token_B1D in x_BND.unflatten(1, (-1, 1)).unbind(1):
        running = iter(range(len(slots)))
        found.append(stage(token_B1D))
    for attention in blocks:
        del attention.attend
    return torch.cat(found, dim=1)
