"""The plain twin of `Recursion`: one call of a block after the other, gradients by autograd."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sret_scale.memory.recursion import Recursion


def plain_recursion(
    recursion: Recursion, x: Tensor, counts: Sequence[int], num_loops: int, backprop_loops: int, kwargs: dict[str, Any]
) -> list[Tensor]:
    """The states after `counts` loops of the last block and at the end; a start's gradient ends where it ends."""
    blocks = list(recursion.blocks)
    uses = [(block, loop) for block in blocks for loop in range(num_loops)]
    if recursion.order != "block":
        is_back = [recursion.order == "model_reversed" and loop == num_loops - 1 > 0 for loop in range(num_loops)]
        uses = [(block, loop) for loop in range(num_loops) for block in (blocks[::-1] if is_back[loop] else blocks)]
    state, found = x, []
    for block, loop in uses:
        with torch.set_grad_enabled(loop >= num_loops - backprop_loops):
            y = block(state + x if recursion.injection == "add" else state, **kwargs)
            if recursion.step_size != 1.0:
                y = state + recursion.step_size * (y - state)
            state = y if recursion.norm is None else recursion.norm(y)
        if block is blocks[-1] and loop + 1 in counts:
            found.append(state)
    return [*found, state]
