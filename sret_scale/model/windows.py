"""Windows: slices that are squares of the image, as fixed permutations of the tokens followed by contiguous groups.

The grid is padded on two sides to a multiple of the window's side, with room for the shift, so one padded grid serves
both partitions: the shifted one is the same after rolling, and what a roll brings together has padding on one side.
Nothing attends to padding, so a shift does not wrap. Letters: P side of the padded grid, L places of a window.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sret_scale.model.config import padded_side
from sret_scale.model.noise import Noise

HIDDEN = -1e4
"""Added to the score of a padded key: its weight is exactly 0, and a window of padding alone still gives numbers."""


class WindowOrder:
    """The orders of a padded grid's tokens in which windows are contiguous: unshifted, and shifted by half a window.

    It is called like a `noise.PermutationSource`, and draws nothing.
    """

    def __init__(self, grid: int, window: int) -> None:
        self.grid, self.window, self.side = grid, window, padded_side(grid, window)
        # On the CPU also where a model is built without storage.
        pixels_PP = torch.arange(self.side**2, device="cpu").view(self.side, self.side)
        self.orders = torch.stack([self._cut(pixels_PP.roll((shift,) * 2, (0, 1))) for shift in (0, window // 2)])

    def __call__(self, noise: Noise | None, count: int, num_tokens: int, device: torch.device) -> Tensor:
        """(2, P * P) int64."""
        return self.orders.to(device)

    def _cut(self, pixels_PP: Tensor) -> Tensor:
        return pixels_PP.unfold(0, self.window, self.window).unfold(1, self.window, self.window).reshape(-1)

    def hidden(self, like: Tensor) -> Tensor:
        """(2, windows, 1, 1, L): what is added to the scores of keys, 0 or `HIDDEN`, for each order."""
        is_padding = F.pad(
            torch.zeros(self.grid, self.grid, device="cpu"), (0, self.side - self.grid) * 2, value=HIDDEN
        ).view(-1)
        return is_padding[self.orders].view(2, -1, 1, 1, self.window**2).to(like.device, like.dtype)

    def padded(self, x_BND: Tensor) -> Tensor:
        """(B, P * P, D) of (B, N, D): zeros on the right and below."""
        x_BHWD = rearrange(x_BND, "b (h w) d -> b h w d", h=self.grid)
        return F.pad(x_BHWD, (0, 0) + (0, self.side - self.grid) * 2).flatten(1, 2)

    def cropped(self, x_BND: Tensor) -> Tensor:
        """The inverse of `padded`."""
        x_BHWD = rearrange(x_BND, "b (h w) d -> b h w d", h=self.side)
        return x_BHWD[:, : self.grid, : self.grid].flatten(1, 2)


def place_pairs(window: int) -> Tensor:
    """((2 window - 1)^2, L * L) one-hot: which offset the places of a query and a key have."""
    places = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    rows, columns = (places[:, None] - places[None] + window - 1).flatten(0, 1).unbind(1)
    return F.one_hot(rows * (2 * window - 1) + columns, (2 * window - 1) ** 2).T.float()
