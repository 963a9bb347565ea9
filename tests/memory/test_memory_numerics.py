"""Tied weights keep their gradients: bf16 autocast under recomputation against float64, at 20 to 1000 uses."""

import pytest
import torch
from torch import Tensor

from sret_scale.memory import MemoryConfig, apply_recomputation
from sret_scale.model import SReTConfig, StageConfig
from sret_scale.model.stage import Stage

WIDTH, TOKENS, BATCH = 32, 16, 8


def stage_of(uses: int) -> Stage:
    config = SReTConfig(
        image_size=32,
        stages=(StageConfig(width=WIDTH, num_heads=2, num_blocks=1, num_loops=uses, projections="per_loop"),),
    )
    torch.manual_seed(0)
    return Stage(config, 0)


def output_and_gradients(stage: Stage, x_BND: Tensor, *, autocast: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """What the stage adds to its input, and the gradients of its shared block."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y_BND = stage(x_BND)
    generator = torch.Generator().manual_seed(2)
    (y_BND * torch.randn(y_BND.shape, generator=generator).to(y_BND.dtype)).sum().backward()
    shared = {name: p.grad for name, p in stage.blocks.named_parameters() if p.grad is not None}
    return y_BND.detach() - x_BND, shared


@pytest.mark.lengthy
@pytest.mark.parametrize("uses", [20, 100, 400, 1000])
def test_bf16_errors_stay_below_one_percent(uses: int) -> None:
    x_BND = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    model = torch.nn.Module()
    stage = stage_of(uses)
    model.stages = torch.nn.ModuleList([stage])
    apply_recomputation(model, MemoryConfig(schedule="binomial"))
    added, gradients = output_and_gradients(stage, x_BND, autocast=True)
    true_added, true_gradients = output_and_gradients(stage_of(uses).double(), x_BND.double(), autocast=False)

    errors = {name: (gradients[name] - true).norm() / true.norm() for name, true in true_gradients.items()}
    total = torch.stack([(gradients[name] - true).norm() for name, true in true_gradients.items()]).norm()
    scale = torch.stack([true.norm() for true in true_gradients.values()]).norm()
    worst = max(errors, key=lambda name: float(errors[name]))
    depth_error = (added - true_added).norm() / true_added.norm()
    print(f"{uses} uses: gradient {total / scale:.2%}, worst {worst} {errors[worst]:.2%}, forward {depth_error:.2%}")
    assert total / scale <= 0.01
    assert depth_error <= 0.01
