"""Matrix products of linear layers, forward and backward, through the fastest library that torch carries.

torch computes fp32 products on a CPU with MKL, which uses AVX2 on processors that are not Intel's; oneDNN, which is in
the same build, uses AVX-512 on all of them. Measured on one core of an AMD EPYC (Zen 5), torch 2.13, 2026-11-22, at the
shapes of SReT-T and S: 70 to 95 GFLOP/s against 130 to 220, with the same rounding error.

Shape letters: M rows (all other dimensions), K input channels, F output channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x_MK: Tensor, weight_FK: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, not differentiable; any leading dimensions."""
    if not _uses_onednn(x_MK):
        return F.linear(x_MK, weight_FK, bias_F)
    # The operation behind the compiler's own CPU code for linear layers. The public way, converting to an oneDNN
    # tensor and back, copies every operand.
    return torch.ops.mkldnn._linear_pointwise(x_MK, weight_FK, bias_F, "none", [], "")


def input_gradient(grad_MF: Tensor, weight_FK: Tensor) -> Tensor:
    """(M, K): the gradient of a linear layer's input."""
    if not _uses_onednn(grad_MF):
        return grad_MF @ weight_FK
    return linear(grad_MF, weight_FK.t())


def weight_gradient(grad_MF: Tensor, x_MK: Tensor) -> Tensor:
    """(F, K): the gradient of a linear layer's weight; leading dimensions are summed over. It may lie transposed."""
    grad_MF, x_MK = grad_MF.flatten(0, -2), x_MK.flatten(0, -2)
    if not _uses_onednn(grad_MF):
        return grad_MF.t() @ x_MK
    # The first operand is copied into row order, so it is the narrower one. A product that comes out transposed is left
    # so: autograd sums the uses of a weight as they lie, and copies the sum once.
    if grad_MF.shape[1] <= x_MK.shape[1]:
        return linear(grad_MF.t(), x_MK.t())
    return linear(x_MK.t(), grad_MF.t()).t()


def _uses_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and _HAS_AVX512_ONEDNN


_HAS_AVX512_ONEDNN = torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)
