"""Regional compilation: the same numbers, and a number of graphs that does not grow with loops."""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sret_scale.memory import MemoryConfig, apply_recomputation
from sret_scale.model import Noise, SReT, SReTConfig, StageConfig
from sret_scale.model.compiled_blocks import compile_blocks
from sret_scale.model.config import ConditioningKind
from sret_scale.model.depth_plan import first_loops

STAGE = StageConfig(width=8, num_heads=2, num_blocks=2, num_loops=3, groups=(4, 2), mlp_ratio=1.5)
CONFIG = SReTConfig(
    stages=(STAGE, replace(STAGE, width=16, groups=(1,))), image_size=16, num_classes=5, stem_strides=(2, 1, 1)
)
IMAGES_BCHW = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def gradients(model: SReT) -> list[torch.Tensor]:
    model.zero_grad()
    model(IMAGES_BCHW, Noise(0, 0)).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.lengthy
@pytest.mark.parametrize(("num_loops", "conditioning"), [(3, "none"), (6, "norm_per_loop")])
def test_graphs_do_not_grow_with_loops_and_numbers_stay(num_loops: int, conditioning: ConditioningKind) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    stages = tuple(replace(stage, conditioning=conditioning) for stage in CONFIG.stages)
    model = SReT(replace(CONFIG, stages=stages)).with_loops(num_loops)
    model.stem.eval()
    expected = gradients(model)
    counter = CompileCounterWithBackend("aot_eager")
    assert compile_blocks(model, backend=counter) is None
    found = gradients(model)
    assert len(found) == len(expected)
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
    # Blocks: two group counts in the first stage, one in the second; projections: one graph a stage.
    assert counter.frame_count == 5
    gradients(model)
    assert counter.frame_count == 5
    torch._dynamo.reset()


@pytest.mark.lengthy
@pytest.mark.parametrize("loops", [5, 75])
def test_20_and_300_applications_have_the_same_graphs_in_every_step(loops: int) -> None:
    torch._dynamo.reset()
    model = SReT(replace(CONFIG, drop_path=0.1)).with_loops(loops)
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, backend=counter)
    apply_recomputation(model, MemoryConfig(schedule="per_application"))
    for step in range(3):
        model(IMAGES_BCHW, Noise(step, step)).square().sum().backward()
        # With and without a tape.
        assert counter.frame_count == 2 * 5
    torch._dynamo.reset()


@pytest.mark.lengthy
@pytest.mark.parametrize("norm_placement", ["pre", "deepnorm"])
def test_steps_of_other_depths_take_the_graphs_of_the_first(norm_placement: Any) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    stages = tuple(replace(stage, norm_placement=norm_placement) for stage in CONFIG.stages)
    model = SReT(replace(CONFIG, stages=stages)).with_loops(6).eval()
    plans = [first_loops(model.config, (count, count)) for count in (2, 3, 4, 6)]
    expected = [model(IMAGES_BCHW, None, [plan])[0] for plan in plans]
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, backend=counter)
    for plan, scores in zip(plans, expected, strict=True):
        torch.testing.assert_close(model(IMAGES_BCHW, None, [plan])[0], scores, rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 5
    torch._dynamo.reset()


def test_dropout_is_left_eager_with_a_reason() -> None:
    assert (
        compile_blocks(SReT(replace(CONFIG, dropout=0.1))) == "not compiled: dropout draws its masks inside the blocks"
    )


def test_no_compiler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    model = SReT(CONFIG)
    reason = compile_blocks(model)
    assert reason is not None and "no C++ compiler" in reason
    assert model(IMAGES_BCHW).isfinite().all()
