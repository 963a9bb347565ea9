"""One rank of the tests of the update rules: `python -m tests.ranks.update_ranks OUT_FOLDER`, in an environment for it.

Trains the toy under every ZeRO stage and rule, straight and with a save and a load in the middle of the plan.
"""

import functools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from sret_scale.config.ds_config import load_ds_config
from sret_scale.config.run_config import OptimConfig
from sret_scale.train.distributed import Ranks, from_rank, gather_fragments, leave, ranks_from_environment
from sret_scale.train.engine.engine import Engine, start_communication
from sret_scale.train.engine.snapshot import Snapshot
from sret_scale.train.optim import build_optimizer, set_rates
from tests.train.update_toy import (
    ACCUMULATION,
    BASE,
    BATCH,
    CASES,
    COMMON_BOUND,
    FP16_STAGES,
    FP16_STEPS,
    PLAN,
    Toy,
    data,
    rate_at,
)

HALF = 4


Rule = Literal["adamw", "lamb", "muon"]


def make_engine(stage: int | str, rule: Rule) -> Engine:
    model = Toy()
    ds_config = load_ds_config(f"zero{stage}")
    ds_config["gradient_clipping"] = COMMON_BOUND
    if "stage3_param_persistence_threshold" in ds_config["zero_optimization"]:
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    optimizer = build_optimizer(model, model.tags(), replace(BASE, optimizer=rule))
    return Engine(model, optimizer, ds_config, micro_batch_size=BATCH, grad_accum_steps=ACCUMULATION)


def train(engine: Engine, steps: range, rank: int) -> None:
    for step in steps:
        planned = PLAN[step]
        set_rates(engine.param_groups, rate_at(step))
        for micro_step in range(ACCUMULATION):
            x, labels = data(step, micro_step, rank)
            engine.backward(F.cross_entropy(engine.forward(x, planned.projections), labels))
            is_updated = engine.step(is_rejected=planned.is_rejected)
        assert is_updated is not planned.is_skipped, (step, engine.last_norms)
        expected = {f"projections.{i}.{kind}" for i in {0, 1} - {*planned.projections} for kind in ("weight", "bias")}
        assert engine.last_norms.unused == expected


def state(engine: Engine, ranks: Ranks) -> dict[str, dict[str, torch.Tensor]]:
    snapshot = Snapshot(is_main=ranks.is_main)
    snapshot.take([*engine.rank_tensors("weights", engine.local_weights()), *engine.optimizer_tensors()])
    return from_rank(snapshot.whole(functools.partial(gather_fragments, group=None)))


def train_fp16(stage: int, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The toy under fp16 autocast with a loss scale that is far too large at first, and how often it overflowed."""
    model = Toy()
    ds_config = load_ds_config("zero1_autocast_fp16")
    ds_config["zero_optimization"]["stage"] = stage
    optimizer = build_optimizer(model, model.tags(), OptimConfig(learning_rate=0.01))
    engine = Engine(model, optimizer, ds_config, micro_batch_size=BATCH, grad_accum_steps=1)
    assert engine.loss_scale
    engine.loss_scale.value = 2.0**21
    num_overflows = 0
    for step in range(FP16_STEPS):
        x, labels = data(0, step, ranks.rank)
        engine.backward(F.cross_entropy(engine.forward(x, (0, 1)).float(), labels))
        is_updated = engine.step()
        assert is_updated is not engine.has_overflowed
        num_overflows += not is_updated
    assert engine.loss_scale.value == 2.0 ** (21 - num_overflows)
    return {**state(engine, ranks)["weights"], "num_overflows": torch.tensor(num_overflows)}


def main(folder: Path) -> None:
    ranks = ranks_from_environment()
    start_communication(ranks)
    for rule in get_args(Rule):
        for stage in CASES[rule]:
            engine = make_engine(stage, rule)
            train(engine, range(HALF), ranks.rank)
            half, missed = state(engine, ranks), dict(engine.missed_updates)
            train(engine, range(HALF, len(PLAN)), ranks.rank)
            resumed = make_engine(stage, rule)
            resumed.load_weights(half["weights"])
            resumed.load_optimizer_state(half["optimizer"], missed)
            train(resumed, range(HALF, len(PLAN)), ranks.rank)
            for label, trained in (("straight", engine), ("resumed", resumed)):
                sets = state(trained, ranks)
                if ranks.is_main:
                    flat = {f"{kind}/{name}": value for kind, values in sets.items() for name, value in values.items()}
                    save_file(flat, folder / f"{rule}.{stage}.{label}.safetensors")
    for stage in FP16_STAGES:
        save_file(train_fp16(stage, ranks), folder / f"fp16.{stage}.{ranks.rank}.safetensors")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
