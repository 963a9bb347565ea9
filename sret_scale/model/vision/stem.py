"""The stem: images to the first stage's tokens on their grid, with a choice of normalisation."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from sret_scale.model.config import SReTConfig, StemNorm
from sret_scale.model.stored_sizes import stem_widths


class Stem(nn.Module):
    """Three 3 x 3 convolutions, each with a norm and ReLU. The first stage's tokens come out as (B, D, H, W).

    Of `pixels`: one linear layer of each pixel, which looks at no neighbour and has no norm.
    `repeats_norms` may be set from outside: the backward pass then runs norms once more, and less than half is stored.
    """

    def __init__(self, config: SReTConfig) -> None:
        super().__init__()
        width = config.stages[0].width
        widths, real_widths = (config.in_channels, *stem_widths(config)), (width // 2, width, width)
        self.repeats_norms = False
        if config.stem == "pixels":
            self.convs, self.norms = nn.ModuleList([nn.Conv2d(widths[0], widths[-1], 1)]), nn.ModuleList()
            return
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1)
            for before, after, stride in zip(widths, widths[1:], config.stem_strides, strict=False)
        )
        self.norms = nn.ModuleList(
            stem_norm(config.stem_norm, *channels) for channels in zip(real_widths, widths[1:], strict=True)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, D, H, W) from images (B, channels, height, width)."""
        x_BCHW = self._first_conv(x_BCHW)
        for norm, conv in zip(self.norms, (*list(self.convs)[1:], None), strict=False):
            repeats = self.repeats_norms and _is_repeatable(norm) and not torch.compiler.is_compiling()
            if repeats and x_BCHW.requires_grad:
                x_BCHW = _NormReluConv.apply(  # type: ignore[no-untyped-call]
                    norm, conv, x_BCHW, norm.weight, norm.bias, *(() if conv is None else (conv.weight, conv.bias))
                )
            else:
                x_BCHW = _norm_relu_conv(norm, conv, x_BCHW)
        return x_BCHW

    def _first_conv(self, x_BCHW: Tensor) -> Tensor:
        conv = cast(nn.Conv2d, self.convs[0])
        if self.repeats_norms and not x_BCHW.requires_grad and not torch.compiler.is_compiling():
            return _ImageConv.apply(conv, x_BCHW, conv.weight, conv.bias)  # type: ignore[no-untyped-call]
        return cast(Tensor, conv(_channels_last(x_BCHW)))


def _channels_last(x_BCHW: Tensor) -> Tensor:
    """Faster in convolutions on every device, and how a stage wants its tokens."""
    return x_BCHW.contiguous(memory_format=torch.channels_last)


class _ImageConv(torch.autograd.Function):
    """A convolution of images that stores them as they came, where autograd stores a copy in another order and type.

    Whoever gave them holds them anyway; the copy is made once more in the backward pass. Images get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, conv: nn.Conv2d, x_BCHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x_BCHW, weight, bias)
        ctx.conv = conv
        return cast(Tensor, conv(_channels_last(x_BCHW)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCHW: Tensor) -> tuple[None, None, Tensor, Tensor]:
        x_BCHW, weight, bias = ctx.saved_tensors
        _, *grads = _conv_backward(ctx.conv, grad_BCHW, _channels_last(x_BCHW), weight, has_input_grad=False)
        return None, None, grads[0].to(weight.dtype), grads[1].to(bias.dtype)


def _norm_relu_conv(norm: nn.Module, conv: nn.Module | None, x_BCHW: Tensor) -> Tensor:
    a_BCHW = F.relu(norm(x_BCHW), inplace=True)
    return a_BCHW if conv is None else cast(Tensor, conv(a_BCHW))


class _NormReluConv(torch.autograd.Function):
    """`conv(relu(norm(x)))` that stores x alone, where autograd stores x and the convolution's input.

    The backward pass normalises x once more, with the bits of the first time; no convolution runs twice, and running
    moments move once. The stem of SReT-T then holds 3.1 MiB an image, not 5.7, for 2.5 ms an image of one CPU core.
    """

    @staticmethod
    def forward(ctx: Any, norm: nn.Module, conv: nn.Conv2d | None, x_BCHW: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x_BCHW, *parameters)
        ctx.norm, ctx.conv = norm, conv
        device = x_BCHW.device.type
        dtype, is_enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.autocast = partial(torch.autocast, device, dtype=dtype, enabled=is_enabled, cache_enabled=False)
        return _norm_relu_conv(norm, conv, x_BCHW)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCHW: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, *parameters = ctx.saved_tensors
        leaves = [tensor.detach().requires_grad_() for tensor in (x_BCHW, *parameters[:2])]
        with torch.enable_grad(), ctx.autocast():
            normed_BCHW = _repeated(ctx.norm, *leaves)
        # No norm looks at its output again, so the ReLU may take its place; from here on each large tensor goes early.
        edge, a_BCHW = get_gradient_edge(normed_BCHW), normed_BCHW.detach().relu_()
        del normed_BCHW
        grads_conv: list[Tensor] = []
        if ctx.conv is None:
            grad_BCHW = torch.ops.aten.threshold_backward(grad_BCHW, a_BCHW, 0)
        else:
            weight, bias = parameters[2:]
            grad_BCHW, *grads = _conv_backward(ctx.conv, grad_BCHW, a_BCHW, weight)
            grads_conv = [grads[0].to(weight.dtype), grads[1].to(bias.dtype)]
            torch.ops.aten.threshold_backward.grad_input(grad_BCHW, a_BCHW, 0, grad_input=grad_BCHW)
        del a_BCHW
        grads_norm = torch.autograd.grad(edge, leaves, grad_BCHW)
        return None, None, *grads_norm, *grads_conv


def _is_repeatable(norm: nn.Module) -> bool:
    """Whether a second run gives the same bits without a trace; a norm over ranks would talk to them again."""
    return isinstance(norm, nn.BatchNorm2d | nn.GroupNorm) and not isinstance(norm, SyncBatchNorm)


def _repeated(norm: nn.Module, x_BCHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`norm(x)` with these weights; running moments stay as they are."""
    if isinstance(norm, nn.BatchNorm2d) and norm.training:
        return F.batch_norm(x_BCHW, None, None, weight, bias, training=True, eps=norm.eps)
    return cast(Tensor, torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x_BCHW,)))


def _conv_backward(
    conv: nn.Conv2d, grad: Tensor, a: Tensor, weight: Tensor, *, has_input_grad: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the weight and the bias, in the type in which the convolution ran."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad,
        a.to(grad.dtype),
        weight.to(grad.dtype),
        [conv.out_channels],
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        [0, 0],
        conv.groups,
        [has_input_grad, True, True],
    )
    return found


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
