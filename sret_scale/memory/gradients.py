"""Gradients of the parameters of a chain, summed over all their uses as plain autograd would sum them."""

from collections.abc import Sequence
from typing import Any

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

    def backward(
        self, output: "Exit", grad_output: list[Tensor], entry: GradientEdge | None, used: Sequence[int]
    ) -> Tensor | None:
        """Propagates through one taped range, which is freed; returns the gradient at its `entry` if it has one.

        `grad_output` holds one tensor, which is taken out, so that it is free as soon as the range has read it.
        `used` are the indices of the trainable parameters that the range may use.
        """
        seeded = [k for k in used if k in self._sums and self._parameters[k].dtype not in HALF_DTYPES]
        inputs: list[Any] = [self._parameters[k] for k in used]
        if entry is not None:
            inputs.append(entry)
        stand_in = output.admit(grad_output)
        results = torch.autograd.grad(
            [output.edge, *(self._edge(k) for k in seeded)],
            inputs,
            [stand_in, *(self._sums[k] for k in seeded)],
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
        return results[-1] if entry is not None else None

    def totals(self) -> list[Tensor | None]:
        """The summed gradient of each parameter in its own type; None where no application used it."""
        return [self._sums[k].to(p.dtype) if k in self._sums else None for k, p in enumerate(self._parameters)]

    def _edge(self, index: int) -> GradientEdge:
        if index not in self._edges:
            self._edges[index] = get_gradient_edge(self._parameters[index])
        return self._edges[index]


def entered(x: Tensor) -> tuple[Tensor, GradientEdge]:
    """`x` as the input of a taped range, and the place where its gradient arrives.

    A leaf would do, but its graph holds it until it has its gradient; this input is held only by operations that
    need it, and one that is merely permuted first is free as soon as it was.
    """
    with torch.enable_grad():
        y = _Entry.apply(torch.empty(0, requires_grad=True), x.detach())  # type: ignore[no-untyped-call]
    return y, get_gradient_edge(y)


class Exit:
    """The end of a taped range, where its gradient comes in.

    The engine holds the gradients that it is started with until it is done. So it gets an empty stand-in, and the node
    at the end of the range exchanges it for the gradient, which nobody else holds.
    """

    def __init__(self, y: Tensor) -> None:
        self._box: list[Tensor] = []
        with torch.enable_grad():
            self.edge: GradientEdge = get_gradient_edge(_Exchange.apply(y, self._box))  # type: ignore[no-untyped-call]
        self._shape = y.shape

    def admit(self, gradient: list[Tensor]) -> Tensor:
        """Takes the gradient out of its list; returns what to start the engine with instead."""
        self._box.append(gradient.pop())
        return self._box[0].new_empty(()).expand(self._shape)


class _Exchange(torch.autograd.Function):
    """The identity; its gradient is the one in the box."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, box: list[Tensor]) -> Tensor:
        ctx.box = box
        return y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.box.pop(), None


class _Entry(torch.autograd.Function):
    """The beginning of a graph; the first input makes it require a gradient. Nobody propagates beyond it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None
