"""Gradients of the parameters of a chain, summed over all their uses as plain autograd would sum them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

HALF_DTYPES = (torch.bfloat16, torch.float16)


class GradientSums:
    """The running gradient of each parameter, while the taped ranges of a chain are propagated from last to first.

    Plain autograd adds the contributions of a tied parameter one by one in the order in which the backward pass meets
    them. Here the sum so far enters the next range as a gradient of the parameter itself, so the engine goes on adding
    in that same order: the result is equal bit for bit, also where one application uses a parameter twice. Parameters
    in 16 bits are the exception, on purpose: their sums are kept in fp32 and rounded once.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._edges: dict[int, GradientEdge] = {}
        self._sums: dict[int, Tensor] = {}

    def backward(self, output: GradientEdge, grad_output: Tensor, leaf: Tensor, used: Sequence[int]) -> Tensor | None:
        """Propagates through one taped range, which is freed; returns the gradient of its input `leaf` if it needs one.

        `used` are the indices of the trainable parameters that the range may use.
        """
        seeded = [k for k in used if k in self._sums and self._parameters[k].dtype not in HALF_DTYPES]
        inputs = [self._parameters[k] for k in used]
        if leaf.requires_grad:
            inputs.append(leaf)
        results = torch.autograd.grad(
            [output, *(self._edge(k) for k in seeded)],
            inputs,
            [grad_output, *(self._sums[k] for k in seeded)],
            allow_unused=True,
        )
        for k, gradient in zip(used, results, strict=False):
            if gradient is None:
                continue
            if gradient.dtype in HALF_DTYPES:
                gradient = gradient.float()
                if k in self._sums:
                    gradient += self._sums[k]
            self._sums[k] = gradient
        return results[-1] if leaf.requires_grad else None

    def totals(self) -> list[Tensor | None]:
        """The summed gradient of each parameter in its own type; None where no application used it."""
        return [self._sums[k].to(p.dtype) if k in self._sums else None for k, p in enumerate(self._parameters)]

    def _edge(self, index: int) -> GradientEdge:
        if index not in self._edges:
            self._edges[index] = get_gradient_edge(self._parameters[index])
        return self._edges[index]
