"""Regional compilation: the same numbers, and a number of graphs that does not grow with loops."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sret_scale.model import Noise, SReT, SReTConfig, StageConfig
from sret_scale.model.compiled_blocks import compile_blocks
from sret_scale.model.config import ConditioningKind

STAGE = StageConfig(width=8, num_heads=2, num_blocks=2, num_loops=3, groups=(4, 2), mlp_ratio=1.5)
CONFIG = SReTConfig(
    stages=(STAGE, replace(STAGE, width=16, groups=(1,))), image_size=16, num_classes=5, stem_strides=(2, 1, 1)
)
IMAGES_BCHW = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def gradients(model: SReT) -> list[torch.Tensor]:
    model.zero_grad()
    model(IMAGES_BCHW, Noise(0, 0)).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


# Tracing looks at the .grad of every tensor that it meets, the stream included, which is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
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


def test_no_compiler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    model = SReT(CONFIG)
    reason = compile_blocks(model)
    assert reason is not None and "no C++ compiler" in reason
    assert model(IMAGES_BCHW).isfinite().all()
