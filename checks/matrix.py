"""The engine's parity matrix: its axes, its cells, and the rank process that trains them one after another.

`python -m checks.matrix TASK` is one rank: it joins its process group once, trains each cell of the task for 20
optimizer steps of a small SReT, whose tied blocks are used 2 and 40 times, and compares what came out with a plain
loop. `python -m checks.product` runs them all.
"""

import functools
import gc
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sret_scale.config.ds_config import load_ds_config
from sret_scale.config.run_config import OptimConfig
from sret_scale.memory import MemoryConfig, apply_recomputation
from sret_scale.model import Noise, SReT, SReTConfig, Stage, StageConfig
from sret_scale.train.distributed import from_rank, leave, ranks_from_environment
from sret_scale.train.engine.engine import Engine, start_communication
from sret_scale.train.optim import WeightAverage, build_optimizer, set_rates

MODEL = SReTConfig(
    stages=(
        StageConfig(width=8, num_heads=2, num_blocks=1, num_loops=2, groups=(2, 1), projections="per_loop"),
        StageConfig(width=16, num_heads=2, num_blocks=1, num_loops=40, groups=(1,), projections="per_loop"),
    ),
    image_size=8,
    num_classes=5,
    stem_strides=(2, 1, 1),
    # A batch norm's statistics depend on how a batch is cut; tests/train/test_train_engine.py holds those.
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


CELLS = {cell.name: cell for cell in all_cells()}


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


@dataclass(frozen=True, kw_only=True)
class Found:
    """How far a cell's weights and averages came out from those of the plain loop."""

    largest: float
    """Absolute, over all weights and averages."""
    share: float
    """L2 over all weights, relative to the way that they went in training."""
    problem: str
    """What does not hold; empty where all does."""


def compare(cell: Cell, got: dict[str, Tensor], plain: dict[str, Tensor]) -> Found:
    """Hold what a cell made against what the plain loop of its precision, accumulation and clipping made."""
    start = make_model().state_dict()
    names = [name for name in plain if cell.ema or not name.startswith("ema.")]
    if sorted(got) != sorted(names):
        return Found(largest=math.nan, share=math.nan, problem="other names than the plain loop's")
    moved = sum(float((plain[name] - start[name]).square().sum()) for name in start)
    apart = sum(float((got[name] - plain[name]).square().sum()) for name in start)
    # torch's max, because Python's drops a NaN that does not come first.
    largest = float(torch.stack([(got[name] - plain[name]).abs().max() for name in names]).max())
    problems = []
    if cell.precision == "fp32" and not largest <= 1e-6:
        problems.append("further apart than 1e-6")
    # A batch cut over ranks rounds other sums to bf16, and Adam gives small gradients full steps (seen: 2.5 %).
    if cell.precision == "bf16" and not apart <= 0.05**2 * moved:
        problems.append("further apart than 5 % of the way")
    if cell.world_size == 1 and cell.precision == "fp32" and not cell.clipping:
        # Nothing is summed in another order: recomputation, ZeRO and accumulation change no bit.
        others = [name for name in names if not torch.equal(got[name], plain[name])]
        if others:
            problems.append(f"other bits: {len(others)} tensors, first {others[0]}")
    return Found(largest=largest, share=(apart / moved) ** 0.5, problem="; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the rank processes of one start have to do."""

    cells: tuple[str, ...]
    plain: str
    """The folder of the plain loops' weights."""
    out: str
    """The file to which rank 0 adds a line for each cell."""
    commit: str
    until_s: float = math.inf
    """No cell begins later, in Unix time."""

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))
        for name in self.cells:
            # All ways of computing and all numbers of ranks share one plain loop.
            cell = CELLS[name]
            if not plain_file(Path(self.plain), cell).exists():
                plain = plain_loop(cell.precision, cell.accumulation, clipping=cell.clipping)
                save_file(plain, plain_file(Path(self.plain), cell))


def plain_file(folder: Path, cell: Cell) -> Path:
    return folder / f"plain-{cell.precision}-{cell.accumulation}-{cell.clipping}.safetensors"


def main(file: Path) -> None:
    """Do the task that lies in `file`."""
    task = Task(**json.loads(file.read_text()))
    ranks = ranks_from_environment()
    start_communication(ranks)
    known_plain = functools.cache(load_file)
    # What is imported stays; without this, collections of garbage, which DeepSpeed forces, walk all of it.
    gc.freeze()
    gc.disable()
    for name in task.cells:
        if from_rank(time.time() > task.until_s):
            break
        started_s, started_cpu_s = time.monotonic(), time.process_time()
        result = train_cell(CELLS[name], ranks.rank)
        if ranks.is_main:
            line = {
                "cell": name,
                "commit": task.commit,
                **asdict(compare(CELLS[name], result, known_plain(plain_file(Path(task.plain), CELLS[name])))),
                "wall_s": time.monotonic() - started_s,
                "cpu_s": time.process_time() - started_cpu_s,
            }
            with Path(task.out).open("a") as out:
                out.write(json.dumps(line) + "\n")
        gc.collect()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
