"""The stem: images to the first stage's tokens on their grid, with a choice of normalisation."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_scale.model.config import SReTConfig, StemNorm
from sret_scale.model.sizes import stem_widths


class Stem(nn.Module):
    """Three 3 x 3 convolutions, each with a norm and ReLU. The first stage's tokens come out as (B, D, H, W)."""

    def __init__(self, config: SReTConfig) -> None:
        super().__init__()
        width = config.stages[0].width
        widths, real_widths = (config.in_channels, *stem_widths(config)), (width // 2, width, width)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1)
            for before, after, stride in zip(widths, widths[1:], config.stem_strides, strict=False)
        )
        self.norms = nn.ModuleList(
            stem_norm(config.stem_norm, *channels) for channels in zip(real_widths, widths[1:], strict=True)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # Channels last is faster in convolutions on every device, and is how a stage wants its tokens.
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x_BCHW = F.relu(norm(conv(x_BCHW)), inplace=True)
        return x_BCHW


def stem_norm(kind: StemNorm, channels: int, stored: int | None = None) -> nn.Module:
    """BatchNorm (published), BatchNorm over all ranks, or a norm of each sample: groups of channels, or all of them.

    Of `stored` channels (default: as many) only the first `channels` are real; what a BatchNorm makes of the others is
    zero.
    """
    stored = channels if stored is None else stored
    if kind == "batch":
        return nn.BatchNorm2d(stored)
    if kind == "sync_batch":
        return SyncBatchNorm(stored)
    # Eight groups where that divides the channels; one group normalises a sample as a whole, as LayerNorm does.
    return PaddedGroupNorm(8 if kind == "group" and channels % 8 == 0 else 1, channels)


class PaddedGroupNorm(nn.GroupNorm):
    """GroupNorm of the first channels; those behind are padding, and come out as zeros."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        padding = x_BCHW.shape[1] - self.num_channels
        if not padding:
            return super().forward(x_BCHW)
        return F.pad(super().forward(x_BCHW[:, : self.num_channels]), (0, 0, 0, 0, 0, padding))


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose training moments are taken over all ranks, on any device (torch's own needs CUDA).

    `all_reduce` sums a tensor over the ranks, with a gradient; whoever distributes the model sets it. Alone it is the
    identity, and this is BatchNorm.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x_BCHW)
        x = x_BCHW.float() if x_BCHW.dtype in (torch.bfloat16, torch.float16) else x_BCHW
        count = x.new_full((1,), x.numel() / x.shape[1])
        # The mean first and then the squares around it: a difference of raw moments would cancel.
        total = self.all_reduce(torch.cat([x.sum(dim=(0, 2, 3)), count]))
        mean, count = total[:-1] / total[-1], total[-1].detach()
        centered = x - mean[:, None, None]
        variance = self.all_reduce(centered.square().sum(dim=(0, 2, 3))) / count
        self._track(mean.detach(), variance.detach(), count)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return centered * scale[:, None, None] + self.bias[:, None, None]

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        # Running variances are unbiased, as in torch.
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked += 1
