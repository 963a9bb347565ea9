"""The functions of `fused` as a composition that autograd and compilers differentiate: for torch.compile and export.

A compiler makes its own choice of what to store, and an autograd function would hide the operations from it.
"""

import torch.nn.functional as F
from torch import Tensor

from sret_scale.model.operations.fused import NORM_EPS


def layer_norm(x_BND: Tensor, norm_D: Tensor, norm_bias_D: Tensor) -> Tensor:
    """LayerNorm of the channels that the norm has; any others are padding and stay zero (`padding`)."""
    padding = x_BND.shape[-1] - len(norm_D)
    if not padding:
        return F.layer_norm(x_BND, norm_D.shape, norm_D, norm_bias_D, NORM_EPS)
    return F.pad(F.layer_norm(x_BND[..., : len(norm_D)], norm_D.shape, norm_D, norm_bias_D, NORM_EPS), (0, padding))


def norm_linear(x_BND: Tensor, norm_D: Tensor, norm_bias_D: Tensor, weight_FD: Tensor, bias_F: Tensor) -> Tensor:
    """See `fused.norm_linear`."""
    return F.linear(layer_norm(x_BND, norm_D, norm_bias_D), weight_FD, bias_F)


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
    """See `fused.project_residual`."""
    if gain_R is not None:
        # As in `fused`: the branch's output would be stored for the coefficient's gradient alone.
        weight_DF, bias_D = gain_R[:, None] * weight_DF, gain_R * bias_D
    branch_BND = F.linear(a_BNF, weight_DF, bias_D)
    if mask is not None:
        branch_BND = branch_BND * mask
    return (x_BND if alpha is None else x_BND * alpha) + branch_BND


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
    """See `fused.feed_forward_residual`."""
    a_BNF = F.gelu(norm_linear(x_BND, *norm, *fc1))
    return project_residual(x_BND, a_BNF, *fc2, alpha=alpha, gain_R=gain_R, mask=mask)
