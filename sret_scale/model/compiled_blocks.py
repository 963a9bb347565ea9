"""Regional compilation: one compiled block serves all blocks, loops and projections of its shape.

Tracing a whole deep model costs time in proportion to its applications (87 s at 192 layers against 0.7 s for a block),
so only a block and a projection are traced: one graph for each stage and number of groups.
"""

import functools
import shutil
from typing import Any

import torch

from sret_scale.model.layers import Block, NonLinearProjection
from sret_scale.model.vision.sret import SReT

# A graph per stage, number of groups, autocast and training mode; torch's default of 8 is too few for three stages.
GRAPHS_PER_FUNCTION = 64


def compile_blocks(model: SReT, *, backend: str | Any = "inductor") -> str | None:
    """Compile the model's blocks and projections in place. None, or the one line that says why it was left as it is."""
    if (
        backend == "inductor"
        and model.position.device.type == "cpu"
        and not (shutil.which("g++") or shutil.which("clang++"))
    ):
        return "not compiled: no C++ compiler (g++ or clang++) on the PATH"
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS_PER_FUNCTION)
    # Compiled as functions of the module, so that modules of one shape share a graph. What a loop owns is worked out
    # outside of `Block.transform`: inside, the loop's number would be a constant of the graph, and every loop get one.
    block_transform = torch.compile(Block.transform, backend=backend, dynamic=False)
    projection_forward = torch.compile(NonLinearProjection.forward, backend=backend, dynamic=False)
    for module in model.modules():
        if isinstance(module, Block):
            module.transform = functools.partial(block_transform, module)  # type: ignore[method-assign]
        elif isinstance(module, NonLinearProjection):
            module.forward = functools.partial(projection_forward, module)  # type: ignore[method-assign]
    return None
