"""Weights carried to other loop counts and image sizes."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from sret_scale.model import SReT, SReTConfig, StageConfig
from sret_scale.model import config as spec

STAGE = StageConfig(width=8, num_heads=2, num_blocks=2, num_loops=2, groups=(4, 2), mlp_ratio=1.5)
CONFIG = SReTConfig(stages=(STAGE,), image_size=16, num_classes=5, stem_strides=(2, 1, 1))
IMAGES_BCHW = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def model_of(**options: Any) -> SReT:
    torch.manual_seed(0)
    model = SReT(replace(CONFIG, stages=(replace(STAGE, **options),))).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.lengthy
@pytest.mark.parametrize("policy", get_args(spec.ProjectionPolicy))
@pytest.mark.parametrize("conditioning", get_args(spec.ConditioningKind))
def test_more_loops_and_back_is_the_same_model(policy: str, conditioning: str) -> None:
    model = model_of(projections=policy, conditioning=conditioning)
    longer = model.with_loops(5)
    assert longer.config.num_applications == 10
    assert longer(IMAGES_BCHW).isfinite().all()
    back = longer.with_loops((2,))
    assert torch.equal(back(IMAGES_BCHW), model(IMAGES_BCHW))


def test_a_new_projection_starts_as_the_identity() -> None:
    longer = model_of().with_loops(3)
    old, new = longer.stages[0].projections[1], longer.stages[0].projections[2]
    x_BND = torch.randn(1, 4, 8, dtype=torch.float64)
    alpha = new.residual.alpha
    assert alpha is not None and float(alpha.detach()) == 1.0
    assert torch.equal(new(x_BND), x_BND)
    assert not torch.equal(old(x_BND), x_BND)


def test_the_position_tensor_is_interpolated() -> None:
    model = model_of()
    larger = model.with_image_size(32)
    assert larger.position.shape == (1, 8, 16, 16)
    assert larger(torch.zeros(1, 3, 32, 32, dtype=torch.float64)).isfinite().all()
    assert torch.equal(model.with_image_size(16)(IMAGES_BCHW), model(IMAGES_BCHW))


def test_a_size_that_the_groups_do_not_divide_names_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"4 groups do not divide 81 tokens \(9 x 9 at image size 18\).*image sizes"):
        model_of().with_image_size(18)
    nearest = replace(CONFIG, image_size=18, group_fit="nearest")
    assert SReT(nearest).eval()(torch.zeros(1, 3, 18, 18)).isfinite().all()
