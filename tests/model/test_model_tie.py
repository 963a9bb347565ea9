"""An untied model tied into few blocks: the same function where its blocks agree."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from sret_scale.model import SReT, SReTConfig, StageConfig
from sret_scale.model import config as spec
from sret_scale.model.vision.tie import tied

STAGES = (
    StageConfig(width=8, num_heads=2, num_blocks=4, num_loops=1, groups=(4,)),
    StageConfig(width=16, num_heads=2, num_blocks=6, num_loops=1, groups=(1,), permute_from_loop=0),
)
CONFIG = SReTConfig(stages=STAGES, image_size=16, num_classes=5, stem_strides=(2, 1, 1))
IMAGES_BCHW = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def untied(*, differs: tuple[str, ...], **options: object) -> SReT:
    """Blocks that agree but for parameters with one of these in their names; everything else is random."""
    torch.manual_seed(0)
    model = SReT(replace(CONFIG, stages=tuple(replace(stage, **options) for stage in STAGES))).double().eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for stage in model.stages:
            first = dict(stage.blocks[0].named_parameters())
            for block in stage.blocks[1:]:
                for name, parameter in block.named_parameters():
                    if not any(part in name for part in differs):
                        parameter.copy_(first[name])
    return model


@pytest.mark.lengthy
@pytest.mark.parametrize("order", get_args(spec.LoopOrder))
@pytest.mark.parametrize("projections", get_args(spec.ProjectionPolicy))
@pytest.mark.parametrize("scheme", ["published", "loop_aware", "layerscale"])
def test_blocks_that_agree_give_the_same_function(order: str, projections: str, scheme: str) -> None:
    model = untied(differs=(), loop_order=order, projections=projections, branch_scheme=scheme)
    small = tied(model, (1, 2))
    assert [(stage.num_blocks, stage.num_loops) for stage in small.config.stages] == [(1, 4), (2, 3)]
    assert sum(p.numel() for p in small.stages.parameters()) < sum(p.numel() for p in model.stages.parameters())
    torch.testing.assert_close(small(IMAGES_BCHW), model(IMAGES_BCHW))


@pytest.mark.parametrize("order", get_args(spec.LoopOrder))
def test_norms_that_differ_can_be_kept(order: str) -> None:
    model = untied(differs=("norm1", "norm2"), loop_order=order)
    torch.testing.assert_close(tied(model, (2, 3), keeps_norms=True)(IMAGES_BCHW), model(IMAGES_BCHW))
    assert not torch.allclose(tied(model, (2, 3))(IMAGES_BCHW), model(IMAGES_BCHW))


def test_a_block_is_the_mean_of_those_it_stands_for() -> None:
    model = untied(differs=("",))
    name = "attention.qkv.weight"
    old = [dict(block.named_parameters())[name] for block in model.stages[0].blocks]
    mean = tied(model, (2, 6)).stages[0].blocks[1]
    torch.testing.assert_close(dict(mean.named_parameters())[name], (old[2] + old[3]) / 2)


@pytest.mark.parametrize(
    ("options", "num_blocks", "message"),
    [
        ({}, (3, 2), r"stage 0: 4 blocks cannot be tied into 3: expected one of \[1, 2, 4\]"),
        ({}, (1,), "each of 2 stages"),
        ({"num_loops": 2}, (1, 2), "stage 0 is tied already: its blocks have 2 loops"),
        ({"conditioning": "norm_per_loop"}, (1, 2), "expected a model with conditioning 'none'"),
    ],
)
def test_what_cannot_be_tied_is_refused(options: dict[str, object], num_blocks: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tied(untied(differs=(), **options), num_blocks)
