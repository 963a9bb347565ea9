"""Constants of branch schemes and norm placements as numbers worked out by hand, and the orders of applications."""

import math
from typing import Any, get_args

import pytest

from sret_scale.model import StageConfig
from sret_scale.model.applications import branch_scales, order_of_uses, residual_constants
from sret_scale.model.config import LoopOrder


def stage(**options: Any) -> StageConfig:
    """4 blocks of 9 loops: 36 applications."""
    return StageConfig(**{"width": 8, "num_heads": 2, "num_blocks": 4, "num_loops": 9, **options})


@pytest.mark.parametrize(
    ("options", "blocks", "projections"),
    [
        ({"branch_scheme": "published"}, (1, 1), (1, 1)),
        ({"branch_scheme": "inv_sqrt"}, (1 / 6, 1), (1 / 6, 1)),
        ({"branch_scheme": "loop_aware"}, (1 / 18, 1), (1 / 36, 1)),
        ({"branch_scheme": "loop_aware", "projections": "per_loop"}, (1 / 18, 1), (1 / 36, 1)),
        ({"branch_scheme": "loop_aware", "projections": "per_block"}, (1 / 18, 1), (1 / 18, 1)),
        ({"branch_scheme": "layerscale"}, (1, 0.1), (1, 0.1)),
        ({"branch_scheme": "rezero"}, (1, 0), (1, 0)),
        ({}, (1 / 18, 1), (1 / 36, 1)),
        ({"num_loops": 2}, (1, 1), (1, 1)),
        ({"num_loops": 3}, (1 / 6, 1), (1 / 12, 1)),
    ],
)
def test_branch_scales(options: dict[str, Any], blocks: tuple[float, float], projections: tuple[float, float]) -> None:
    found = [(scale.multiplier, scale.init) for scale in branch_scales(stage(**options))]
    assert found == [pytest.approx(blocks), pytest.approx(projections)]
    assert all(
        scale.per_channel == (options.get("branch_scheme") == "layerscale") for scale in branch_scales(stage(**options))
    )


@pytest.mark.parametrize(
    ("placement", "branch", "stream"),
    # 32 applications: (8 x 32)^(-1/4) = 1/4 and 64^(1/4) = sqrt(8); with square roots 1/16 and 8.
    [("pre", 1 / 16, 1), ("subln", 1 / 16, 1), ("deepnorm", 1 / 4, 8**0.5), ("deeploop", 1 / 16, 8)],
)
def test_constants_of_norm_placements(placement: str, branch: float, stream: float) -> None:
    block, _ = residual_constants(stage(num_loops=8, norm_placement=placement))
    assert block == pytest.approx((branch, stream))


def layers_of_takase_and_kiyono(order: str, num_blocks: int, num_loops: int) -> list[int]:
    """SEQUENCE, CYCLE and CYCLE (REV) of arXiv 2104.06022, line by line: the block of each layer, both from 1."""
    blocks, layers = num_blocks, num_blocks * num_loops
    found = []
    for i in range(1, layers + 1):
        if order == "block":
            found.append((i - 1) // num_loops + 1)
        elif i <= blocks:
            found.append(i)
        elif order == "model" or i <= blocks * (math.ceil(layers / blocks) - 1):
            found.append((i - 1) % blocks + 1)
        else:
            found.append(blocks - (i - 1) % blocks)
    return found


@pytest.mark.parametrize("order", get_args(LoopOrder))
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5])
@pytest.mark.parametrize("num_loops", [1, 2, 3, 4])
def test_orders_are_those_of_the_paper_that_compared_them(order: LoopOrder, num_blocks: int, num_loops: int) -> None:
    uses = order_of_uses(order, num_blocks, num_loops)
    assert [block + 1 for block, _ in uses] == layers_of_takase_and_kiyono(order, num_blocks, num_loops)
    for block in range(num_blocks):
        assert [loop for used, loop in uses if used == block] == list(range(num_loops))
    if order == "model_reversed" and num_loops > 1:
        assert [block for block, _ in uses[-2 * num_blocks :]] == [*range(num_blocks), *reversed(range(num_blocks))]
