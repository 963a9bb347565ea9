"""The axes of the engine's parity matrix, its cells, and the rank process that trains them one after another.

`python -m tests.matrix OUT_FOLDER CELL ...` is one rank: it joins its process group once, and leaves for each cell what
20 optimizer steps made of a small SReT, whose tied blocks are used 2 and 40 times.
"""

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from sret_scale.memory import MemoryConfig, apply_recomputation
from sret_scale.model import Noise, SReT, SReTConfig, Stage, StageConfig
from sret_scale.train.config import OptimConfig
from sret_scale.train.distributed import leave, ranks_from_environment
from sret_scale.train.ds_config import load_ds_config
from sret_scale.train.engine import Engine, start_communication
from sret_scale.train.optim import WeightAverage, build_optimizer, set_rates

MODEL = SReTConfig(
    stages=(
        StageConfig(width=8, num_heads=2, num_blocks=1, num_loops=2, groups=(2, 1), projections="per_loop"),
        StageConfig(width=16, num_heads=2, num_blocks=1, num_loops=40, groups=(1,), projections="per_loop"),
    ),
    image_size=8,
    num_classes=5,
    stem_strides=(2, 1, 1),
    # A batch norm's statistics depend on how a batch is cut; tests/test_train_engine.py holds those.
    stem_norm="layer",
)
STEPS, GLOBAL_BATCH, RATE = 20, 4, 2e-3
CLIP_NORM = 0.05  # below the norms of these gradients, so that it always acts
EMA_HORIZON = 40
OPTIM = OptimConfig(learning_rate=RATE, eps=1e-4)
"""Adam divides by the root of the second moment plus eps. With 1e-8, parameters whose true gradient is 0 (a key's bias)
would follow the sign of rounding errors at full rate; 1e-4 keeps what is rounding error that small."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination; the name of a value is its text."""

    world_size: int
    zero_stage: int
    memory: str
    precision: str
    accumulation: str
    clipping: bool
    ema: bool

    @property
    def name(self) -> str:
        return "-".join(str(getattr(self, entry.name)) for entry in fields(self))


AXES: dict[str, tuple[Any, ...]] = {
    "zero_stage": (0, 1, 2, 3),
    "memory": ("none", "per_application", "nested", "binomial"),
    "accumulation": ("1", "3", "3cut"),
    "world_size": (1, 2),
    "precision": ("fp32", "bf16"),
    "clipping": (False, True),
    "ema": (False, True),
}
"""`3cut`: three micro-batches a step, but the last step of an epoch of seven micro-batches has one."""


def all_cells() -> list[Cell]:
    return [Cell(**dict(zip(AXES, values, strict=True))) for values in itertools.product(*AXES.values())]


def pairs_of(cell: Cell) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """The pairs of values of two axes that a cell tries."""
    values = [(axis, getattr(cell, axis)) for axis in AXES]
    return set(itertools.combinations(values, 2))


def pairwise_cells() -> list[Cell]:
    """Few cells that try every pair of values together: each time the cheapest of those with the most new pairs."""
    cells, chosen = all_cells(), []
    missing = set().union(*map(pairs_of, cells))
    while missing:
        chosen.append(max(cells, key=lambda cell: (len(pairs_of(cell) & missing), -num_passes(cell))))
        missing -= pairs_of(chosen[-1])
    return chosen


def num_passes(cell: Cell) -> int:
    """Micro-batches of all ranks together: what a cell costs."""
    return cell.world_size * sum(windows(cell.accumulation))


def windows(accumulation: str) -> Iterator[int]:
    """Micro-batches of each step."""
    pattern = {"1": (1,), "3": (3,), "3cut": (3, 3, 1)}[accumulation]
    return itertools.islice(itertools.cycle(pattern), STEPS)


def batch(step: int, micro_step: int) -> tuple[Tensor, Tensor]:
    """A micro-batch of all ranks together."""
    generator = torch.Generator().manual_seed(1000 * step + micro_step)
    images = torch.randn(GLOBAL_BATCH, 3, 8, 8, generator=generator)
    return images, torch.randint(5, (GLOBAL_BATCH,), generator=generator)


def make_model() -> SReT:
    torch.manual_seed(0)
    return SReT(MODEL)


def rate_at(step: int) -> float:
    return RATE / (1 + step / 10)


def engine_of(cell: Cell, model: SReT) -> Engine:
    ds_config = load_ds_config(f"zero{cell.zero_stage}")
    ds_config["gradient_clipping"] = CLIP_NORM if cell.clipping else 0.0
    if cell.precision == "bf16":
        ds_config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    if cell.zero_stage == 3:
        # The shipped threshold keeps parameters of this size whole; here they must really be partitioned.
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    apply_recomputation(model, MemoryConfig(schedule=cell.memory))
    return Engine(
        model,
        build_optimizer(model, model.parameter_tags(), OPTIM),
        ds_config,
        micro_batch_size=GLOBAL_BATCH // cell.world_size,
        grad_accum_steps=1 if cell.accumulation == "1" else 3,
        z3_leaf_modules=(Stage,),
    )


def train_cell(cell: Cell, rank: int) -> dict[str, Tensor]:
    """Weights, and the average as `ema.NAME`, after all steps."""
    model = make_model()
    engine = engine_of(cell, model)
    average = WeightAverage(engine.local_weights(), EMA_HORIZON) if cell.ema else None
    size = GLOBAL_BATCH // cell.world_size
    mine = slice(rank * size, (rank + 1) * size)
    for step, window in enumerate(windows(cell.accumulation)):
        set_rates(engine.param_groups, rate_at(step))
        for micro_step in range(window):
            images, labels = batch(step, micro_step)
            if cell.accumulation == "3cut":
                # DeepSpeed divides by 3 whatever the window; it has to be told where a shorter one ends.
                engine._engine.set_gradient_accumulation_boundary(micro_step == window - 1)
            logits = engine.forward(images[mine], Noise(permutation_seed=step, sample_seed=step))
            loss = F.cross_entropy(logits.float(), labels[mine])
            engine.backward(loss * (3 / window if cell.accumulation == "3cut" else 1))
            engine.step()
        if average:
            average.update(engine.local_weights(), GLOBAL_BATCH * window)
    result = engine.weights()
    if average:
        result |= {f"ema.{name}": value for name, value in engine.assemble(average.averages).items()}
    return result


def plain_loop(precision: str, accumulation: str, *, clipping: bool) -> dict[str, Tensor]:
    """The same in plain PyTorch, in one process: no DeepSpeed, no recomputation, torch's own AdamW and clipping."""
    model = make_model()
    tags = model.parameter_tags()
    groups = [
        {
            "params": [value],
            "weight_decay": OPTIM.weight_decay if tags[name].decay else 0.0,
            "ratio": tags[name].lr_scale,
        }
        for name, value in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps, fused=True)
    average: dict[str, Tensor] = {}
    for step, window in enumerate(windows(accumulation)):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step) * group["ratio"]
        optimizer.zero_grad()
        for micro_step in range(window):
            images, labels = batch(step, micro_step)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = model(images, Noise(permutation_seed=step, sample_seed=step))
            (F.cross_entropy(logits.float(), labels) / window).backward()
        if clipping:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        newest = max(-math.expm1(-GLOBAL_BATCH * window / EMA_HORIZON), 1 / (step + 1))
        for name, value in model.state_dict().items():
            average[name] = torch.lerp(average.get(name, value), value, newest)
    return {name: value.detach().clone() for name, value in model.state_dict().items()} | {
        f"ema.{name}": value for name, value in average.items()
    }


def main(folder: Path, names: list[str]) -> None:
    ranks = ranks_from_environment()
    start_communication(ranks)
    for cell in all_cells():
        if cell.name in names:
            result = train_cell(cell, ranks.rank)
            if ranks.is_main:
                save_file(result, folder / f"{cell.name}.safetensors")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
