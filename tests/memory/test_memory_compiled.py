"""Compiled blocks need no more memory than eager ones, which is what the planner predicts.

Elsewhere the backward passes of compiled regions that share a block were seen to hold several blocks at once (pytorch
issue 193193).
"""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sret_scale.memory import MemoryConfig, apply_recomputation
from sret_scale.memory.planning.costs import measure_application
from sret_scale.model import Noise, SReT, SReTConfig, StageConfig
from sret_scale.model.compiled_blocks import compile_blocks

# What inductor imports.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
STAGE = StageConfig(width=64, num_heads=2, num_blocks=1, num_loops=2, groups=(4,))
CONFIG = SReTConfig(stages=(STAGE,), image_size=32, num_classes=5, stem_strides=(2, 2, 1), drop_path=0.1)
IMAGES_BCHW = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PARTITIONED = "aot_eager_decomp_partition"
"""Inductor's choice of what a tape holds, without its kernels."""
BOUNDARY_BYTES = 8 * 8 * 8 * 64 * 4


def saved_bytes(output: Tensor, model: SReT) -> int:
    """What the graph behind `output` holds, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}
    waiting: list[Any] = [output.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for saved in getattr(node, "saved_tensors", ()):
            storage = saved.untyped_storage()
            if storage.data_ptr() not in parameters:
                found[storage.data_ptr()] = storage.nbytes()
        waiting += [following for following, _ in node.next_functions]
    return sum(found.values())


@pytest.mark.lengthy
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_tape_holds_no_more_than_the_eager_one_that_is_predicted(precision: str) -> None:
    torch._dynamo.reset()
    model, held = SReT(CONFIG).train(), []

    def look(applications: Any, x_BND: Tensor) -> Tensor:
        eager = measure_application(applications[1], x_BND.detach()).tape_bytes
        assert compile_blocks(model, backend=PARTITIONED) is None
        output_BND = applications[1](x_BND.detach().clone().requires_grad_())
        held.append((saved_bytes(output_BND, model), eager))
        return x_BND

    model.stages[0].run_chain = look  # type: ignore[assignment]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(IMAGES_BCHW, Noise(0, 0))
    ((compiled, eager),) = held
    assert 0.75 * eager <= compiled <= eager
    torch._dynamo.reset()


def peak_bytes(loops: int, schedule: Any, backend: str | None) -> int:
    """Of the third step, by torch's profiler, which sees what the allocator gives to compiled code too."""
    torch.manual_seed(0)
    model = SReT(replace(CONFIG, stages=(replace(STAGE, num_loops=loops, projections="per_block"),))).train()
    apply_recomputation(model, MemoryConfig(schedule=schedule))
    if backend:
        assert compile_blocks(model, backend=backend) is None

    def step() -> None:
        model(IMAGES_BCHW, Noise(0, 0)).square().sum().backward()

    for _ in range(2):
        step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.lengthy
def test_one_compiled_tape_lives_at_a_time_however_often_a_block_is_used() -> None:
    torch._dynamo.reset()
    few, many = (peak_bytes(loops, "per_application", PARTITIONED) for loops in (4, 20))
    assert many - few <= 16 * BOUNDARY_BYTES * 1.02
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("schedule", ["none", "per_application", "binomial"])
def test_steps_of_inductor_peak_no_higher_than_eager_ones(schedule: str) -> None:
    torch._dynamo.reset()
    for loops in (4, 16):
        assert peak_bytes(loops, schedule, "inductor") <= 1.02 * peak_bytes(loops, schedule, None)
    torch._dynamo.reset()
