"""Residual sub-layers as autograd functions that store 12.6 widths of activations per SReT-T application, not 22.

What autograd would store and these compute again from the stream: LayerNorm outputs, GELU outputs, and branch outputs,
whose only use is the gradient of the residual coefficient (it is `sum(dW * W)` of the projection before it, so the
coefficient is folded into that projection). Products run in the autocast dtype, the stream and all sums in its own.
`plain` holds the same functions as autograd writes them.

A mask is (B, 1, 1) for stochastic depth or (B, N, D) for dropout: factors of the branch, already scaled.

Shape letters: B batch, N tokens, D width, F hidden or output channels, R one or D residual coefficients.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sret_scale.model.operations.matmul import input_gradient, linear, weight_gradient

NORM_EPS = 1e-6

Grads = tuple[Tensor | None, ...]


def norm_linear(x_BND: Tensor, norm_D: Tensor, norm_bias_D: Tensor, weight_FD: Tensor, bias_F: Tensor) -> Tensor:
    """(B, N, F): a linear layer of the LayerNorm of the stream."""
    return _NormLinear.apply(x_BND, norm_D, norm_bias_D, weight_FD, bias_F)  # type: ignore[no-untyped-call]


def project_residual(
    x_BND: Tensor,
    a_BNF: Tensor,
    weight_DF: Tensor,
    bias_D: Tensor,
    *,
    alpha: Tensor | None,
    gain_R: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """`alpha * x + mask * gain * (a @ weight.T + bias)`; None for alpha, gain or mask is 1."""
    return _ProjectResidual.apply(  # type: ignore[no-untyped-call]
        x_BND, a_BNF, weight_DF, bias_D, alpha, gain_R, mask
    )


def feed_forward_residual(
    x_BND: Tensor,
    norm: tuple[Tensor, Tensor],
    fc1: tuple[Tensor, Tensor],
    fc2: tuple[Tensor, Tensor],
    *,
    alpha: Tensor | None,
    gain_R: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """`alpha * x + mask * gain * fc2(gelu(fc1(norm(x))))`; each layer is its (weight, bias)."""
    return _FeedForwardResidual.apply(  # type: ignore[no-untyped-call]
        x_BND, *norm, *fc1, *fc2, alpha, gain_R, mask
    )


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, norm, norm_bias, weight)
        ctx.dtype = _product_dtype(x)
        return _linear(_layer_norm(x, norm, norm_bias)[0], weight, bias, ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, norm, norm_bias, weight = ctx.saved_tensors
        return _norm_linear_backward(grad, x, norm, norm_bias, weight, ctx.dtype)


class _ProjectResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, weight: Tensor, bias: Tensor, alpha: Any, gain: Any, mask: Any
    ) -> Tensor:
        ctx.save_for_backward(None if alpha is None else x, a, weight, bias, alpha, gain, mask)
        ctx.dtype = _product_dtype(x)
        return _residual(x, a, weight, bias, alpha, gain, mask, ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, a, weight, bias, alpha, gain, mask = ctx.saved_tensors
        grad_a, grad_weight, grad_bias, grad_gain = _projection_backward(grad, a, weight, bias, gain, mask, ctx.dtype)
        grad_x = grad if alpha is None else grad * alpha
        return grad_x, grad_a, grad_weight, grad_bias, _alpha_gradient(grad, x, alpha), grad_gain, None


class _FeedForwardResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        norm_bias: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        alpha: Tensor | None,
        gain: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        ctx.dtype = _product_dtype(x)
        hidden = _linear(_layer_norm(x, norm, norm_bias)[0], weight1, bias1, ctx.dtype)
        ctx.save_for_backward(x, hidden, norm, norm_bias, weight1, weight2, bias2, alpha, gain, mask)
        return _residual(x, F.gelu(hidden), weight2, bias2, alpha, gain, mask, ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, hidden, norm, norm_bias, weight1, weight2, bias2, alpha, gain, mask = ctx.saved_tensors
        # Nothing but the names here holds them then, unless the graph is retained. AOTAutograd does the same.
        ctx.maybe_clear_saved_tensors()
        grad_a, grad_weight2, grad_bias2, grad_gain = _projection_backward(
            grad, F.gelu(hidden), weight2, bias2, gain, mask, ctx.dtype
        )
        # A step peaks here, between tensors of F channels: one is written over, and no name outlives its use.
        torch.ops.aten.gelu_backward.grad_input(grad_a, hidden, grad_input=grad_a)
        last = [grad_a]
        del grad_a, hidden
        grad_x, *grads_before = _norm_linear_backward(last.pop(), x, norm, norm_bias, weight1, ctx.dtype)
        assert grad_x is not None
        if alpha is None:
            grad_x += grad
        else:
            grad_x.addcmul_(grad, alpha)
        grad_alpha = _alpha_gradient(grad, x, alpha)
        return grad_x, *grads_before, grad_weight2, grad_bias2, grad_alpha, grad_gain, None


def _product_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _layer_norm(x: Tensor, norm: Tensor, norm_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and mean and reciprocal deviation. Channels beyond the norm's are padding (`padding`)."""
    width, stored = len(norm), x.shape[-1]
    if width == stored:
        return torch.native_layer_norm(x, norm.shape, norm, norm_bias, NORM_EPS)
    normed, mean, rstd = torch.native_layer_norm(x[..., :width], norm.shape, norm, norm_bias, NORM_EPS)
    return F.pad(normed, (0, stored - width)), mean, rstd


def _linear(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    return linear(x.to(dtype), weight.to(dtype), bias.to(dtype))


def _residual(
    x: Tensor,
    a: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor | None,
    gain: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    if gain is not None:
        weight, bias = gain[:, None] * weight, gain * bias
    branch = _linear(a, weight, bias, dtype).to(x.dtype)
    if mask is not None:
        branch *= mask
    return branch.add_(x) if alpha is None else branch.addcmul_(x, alpha)


def _projection_backward(
    grad: Tensor, a: Tensor, weight: Tensor, bias: Tensor, gain: Tensor | None, mask: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of a, weight, bias and gain of `mask * gain * (a @ weight.T + bias)`."""
    if mask is not None:
        grad = grad * mask
    # A mask is fp32; weights may be of half precision.
    summed = grad.flatten(0, 1).sum(dim=0, dtype=weight.dtype)
    grad = grad.to(dtype)
    product = weight_gradient(grad, a.to(dtype)).to(weight.dtype).contiguous()
    del a  # often the last reference
    if gain is None:
        return input_gradient(grad, weight.to(dtype)), product, summed, None
    grad_a = input_gradient(grad, (gain[:, None] * weight).to(dtype))
    if len(gain) > 1:
        grad_gain = (product * weight).sum(dim=1) + summed * bias
    else:
        grad_gain = (torch.dot(product.view(-1), weight.reshape(-1)) + torch.dot(summed, bias)).view(1)
    return grad_a, product.mul_(gain[:, None]), summed.mul_(gain), grad_gain


def _norm_linear_backward(
    grad: Tensor, x: Tensor, norm: Tensor, norm_bias: Tensor, weight: Tensor, dtype: torch.dtype
) -> Grads:
    """Gradients of x, norm, norm_bias, weight and bias of a linear layer of a LayerNorm."""
    normed, mean, rstd = _layer_norm(x, norm, norm_bias)
    grad_bias = grad.flatten(0, 1).sum(dim=0, dtype=weight.dtype)
    grad_weight = weight_gradient(grad, normed.to(dtype)).to(weight.dtype)
    del normed
    grad_normed = input_gradient(grad, weight.to(dtype)).to(x.dtype)
    del grad
    padding = x.shape[-1] - len(norm)
    if padding:
        grad_normed, x = grad_normed[..., : len(norm)], x[..., : len(norm)]
    grad_x, *grads = torch.ops.aten.native_layer_norm_backward(
        grad_normed, x, norm.shape, mean, rstd, norm, norm_bias, [True, True, True]
    )
    return F.pad(grad_x, (0, padding)) if padding else grad_x, *grads, grad_weight, grad_bias


def _alpha_gradient(grad: Tensor, x: Tensor | None, alpha: Tensor | None) -> Tensor | None:
    if alpha is None:
        return None
    assert x is not None
    return torch.dot(grad.reshape(-1), x.reshape(-1)).reshape(1)
