"""What the layers compute with: operations that store little for the backward pass, or ones that a compiler sees."""

from typing import Protocol

import torch
from torch import Tensor

from sret_scale.model.operations import fused, unfused

Affine = tuple[Tensor, Tensor]
"""Weight and bias of a norm or of a linear layer."""


class Operations(Protocol):
    """What the layers compute with; the modules `fused` and `unfused` are two of it."""

    def norm_linear(
        self, x_BND: Tensor, norm_D: Tensor, norm_bias_D: Tensor, weight_FD: Tensor, bias_F: Tensor, /
    ) -> Tensor: ...

    def project_residual(
        self,
        x_BND: Tensor,
        a_BNF: Tensor,
        weight_DF: Tensor,
        bias_D: Tensor,
        /,
        *,
        alpha: Tensor | None,
        gain_R: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor: ...

    def feed_forward_residual(
        self,
        x_BND: Tensor,
        norm: Affine,
        fc1: Affine,
        fc2: Affine,
        /,
        *,
        alpha: Tensor | None,
        gain_R: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor: ...


def operations() -> Operations:
    """`fused`, which stores less for the backward pass, unless a compiler or exporter looks at the operations."""
    return unfused if torch.compiler.is_compiling() else fused
