"""Lazy token order: a stage stays in permuted order between applications and moves by one relative gather each.

LayerNorm, feed-forward and projection act per token and attention over all tokens is equivariant, so only slices need
an order. The reference permutes and undoes it at every application: two gathers, each with an accumulating backward.
"""

import torch
from torch import Tensor


class _ReorderTokens(torch.autograd.Function):
    """A gather along the tokens whose backward is the inverse gather, not a scatter that adds."""

    @staticmethod
    def forward(ctx, x_BND: Tensor, gather_N: Tensor, scatter_N: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(scatter_N)
        return x_BND.index_select(1, as_index(gather_N))

    @staticmethod
    def backward(ctx, grad_BND: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (scatter_N,) = ctx.saved_tensors
        return grad_BND.index_select(1, as_index(scatter_N)), None, None


def reorder_tokens(x_BND: Tensor, gather_N: Tensor, scatter_N: Tensor) -> Tensor:
    """`x_BND[:, gather_N]`; scatter_N must be the inverse permutation of gather_N."""
    return _ReorderTokens.apply(x_BND, gather_N, scatter_N)  # type: ignore[no-untyped-call]


def strided_order(num_tokens: int, groups: int) -> Tensor:
    """(N,) tokens 0, g, 2 g, ..., then 1, g + 1, ...: a contiguous slice of it has every g-th token."""
    return torch.arange(num_tokens).view(-1, groups).t().reshape(-1)


def ascending_slices(order_N: Tensor, groups: int) -> Tensor:
    """The same slices, each in its tokens' own order, in which attention to what came before stays what it is."""
    return order_N.view(groups, -1).sort(dim=1).values.view(-1)


def as_index(table_N: Tensor) -> Tensor:
    """A table in a type that indexes."""
    return table_N.int() if table_N.dtype == torch.int16 else table_N


def table_dtype(num_tokens: int, device: torch.device) -> torch.dtype:
    """The type of a stage's tables: a step holds two of N entries for each application.

    At 1000 applications of SReT-T they are 4.9 MiB in int64. A CPU makes the narrowest type an index in no time; on a
    GPU that would be one more launch.
    """
    return torch.int16 if device.type == "cpu" and num_tokens <= 2**15 else torch.int32


class TokenOrder:
    """The order in which a stage's tokens lie now: one of the drawn permutations, or None for the image's own."""

    def __init__(self, permutations: Tensor | None) -> None:
        """permutations: (count, N) whole numbers, or None where nothing is permuted."""
        self.permutations = self.inverses = None
        if permutations is not None:
            dtype = table_dtype(permutations.shape[1], permutations.device)
            self.permutations = permutations.to(dtype)
            self.inverses = permutations.argsort(dim=1).to(dtype)
        self.count = 0 if permutations is None else len(permutations)
        self.current: int | None = None
        self._ways: dict[tuple[int | None, int | None], tuple[Tensor, Tensor]] = {}

    def move_to(self, target: int | None) -> tuple[Tensor, Tensor] | None:
        """(gather, its inverse) that bring the tokens from the current order to the target; None if they are there."""
        move = self.way(self.current, target)
        self.current = target
        return move

    def way(self, before: int | None, target: int | None) -> tuple[Tensor, Tensor] | None:
        """(gather, its inverse) from one order to another; None if they are the same."""
        if target == before:
            return None
        # Windows take the same ways again and again.
        if (before, target) not in self._ways:
            self._ways[before, target] = self._found(before, target)
        return self._ways[before, target]

    def _found(self, before: int | None, target: int | None) -> tuple[Tensor, Tensor]:
        assert self.permutations is not None and self.inverses is not None
        # Copies where a row would do: a row would keep the whole table alive.
        if before is None:
            return self.permutations[target].clone(), self.inverses[target].clone()
        if target is None:
            return self.inverses[before].clone(), self.permutations[before].clone()
        return (
            self.inverses[before].index_select(0, as_index(self.permutations[target])),
            self.inverses[target].index_select(0, as_index(self.permutations[before])),
        )
