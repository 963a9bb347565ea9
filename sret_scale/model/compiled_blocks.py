"""Regional compilation: one compiled block serves all blocks, loops and projections of its shape.

Tracing a whole deep model costs time in proportion to its applications (87 s at 192 layers against 0.7 s for a block),
so only a block and a projection are traced: one graph for each stage and number of groups.
"""

import functools
import importlib.util
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sret_scale.model.layers import Block, NonLinearProjection
from sret_scale.model.stack import StackModel

# A graph per stage, number of groups, autocast and training mode; torch's default of 8 is too few for three stages.
GRAPHS_PER_FUNCTION = 64


def compile_blocks(model: StackModel, *, backend: str | Any = "inductor") -> str | None:
    """Compile the model's blocks and projections in place. None, or the one line that says why it was left as it is."""
    if reason := why_not_compiled(model, backend):
        return f"not compiled: {reason}"
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS_PER_FUNCTION)
    # Between a forward and its backward pass the graphs keep what the fused operations keep, or less, as the planner
    # counts it: everything but products is computed again. By default it is 1.5 to 1.8 times that.
    torch._functorch.config.aggressive_recomputation = True
    # Tracing looks at the .grad of every tensor that it meets, the stream included, which is no leaf.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    # Compiled as functions of the module, so that modules of one shape share a graph. What a loop owns is worked out
    # outside of `Block.transform`: inside, the loop's number would be a constant of the graph, and every loop get one.
    block_transform = torch.compile(Block.transform, backend=backend, dynamic=False)
    projection_transform = torch.compile(NonLinearProjection.transform, backend=backend, dynamic=False)
    for module in model.modules():
        if isinstance(module, Block):
            module.transform = functools.partial(_with_constants_at, 6, block_transform, module)  # type: ignore[method-assign]
        elif isinstance(module, NonLinearProjection):
            module.transform = functools.partial(  # type: ignore[method-assign]
                _with_constants_at, 3, projection_transform, module
            )
    return None


def why_not_compiled(model: StackModel, backend: str | Any = "inductor") -> str | None:
    """What this process lacks to compile the model, or the model does not allow."""
    if model.config.dropout:
        return "dropout draws its masks inside the blocks"
    if backend != "inductor":
        return None
    if next(model.parameters()).device.type != "cpu":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    return None if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler (g++ or clang++) on the PATH"


def _with_constants_at(place: int, compiled: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Calls `compiled(module, x, ...)`. Numbers of residual constants would be constants of a graph, and every depth
    that a step can have would get its own: they enter as tensors."""
    given = list(arguments)
    if given[place] is not None:
        given[place] = tuple(v if v == 1.0 else given[1].new_full((1,), float(v)) for v in given[place])
    return compiled(*given)
