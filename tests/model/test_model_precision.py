"""Precision at depth: gradients of a block that is used many times, in bf16 products against float64."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sret_scale.model import SReT, SReTConfig, Stage, StageConfig
from tests.model.typed_stages import stages_of

STAGE = StageConfig(width=16, num_heads=2, num_blocks=1, groups=(1,), mlp_ratio=2.0, projections="none")
CONFIG = SReTConfig(stages=(STAGE,), image_size=8, num_classes=5, stem_strides=(2, 1, 1))


def tied_gradient(stage: Stage, x_BND: Tensor) -> Tensor:
    (stage(x_BND) * torch.linspace(-1, 1, x_BND.numel(), dtype=x_BND.dtype).view_as(x_BND)).sum().backward()
    gradient = stage.blocks[0].feed_forward.fc1.weight.grad
    assert isinstance(gradient, Tensor)
    return gradient.double()


@pytest.mark.lengthy
@pytest.mark.parametrize("num_loops", [20, 100, 400])
def test_bf16_gradient_error_does_not_grow_with_loops(num_loops: int) -> None:
    torch.manual_seed(0)
    (stage,) = stages_of(SReT(replace(CONFIG, stages=(replace(STAGE, num_loops=num_loops),))))
    x_BND = torch.randn(2, 16, 16)
    exact = tied_gradient(copy.deepcopy(stage).double(), x_BND.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tied_gradient(stage, x_BND)
    # 0.2 % at every depth; summed in bf16, as with the weight cache of autocast, 400 uses would be off by 5 %.
    assert float((found - exact).norm() / exact.norm()) < 0.005


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_train_too(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = SReT(CONFIG)
    images, weights = torch.randn(2, 3, 8, 8), torch.linspace(-1, 1, 10).view(2, 5)
    (model(images) * weights).sum().backward()
    half = copy.deepcopy(model).to(dtype)
    half.zero_grad()
    (half(images.to(dtype)) * weights).sum().backward()
    for (name, found), expected in zip(half.stages.named_parameters(), model.stages.parameters(), strict=True):
        assert found.grad is not None and found.grad.dtype == dtype and expected.grad is not None
        scale = max(float(expected.grad.norm()), 1e-2)
        assert float((found.grad.float() - expected.grad).norm()) < 0.25 * scale, name
