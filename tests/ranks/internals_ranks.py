"""One of two ranks of the tests of DeepSpeed's private names: `python -m tests.ranks.internals_ranks OUT_FOLDER`.

Writes what each function of `deepspeed_internals` did as OUT_FOLDER/RANK.json, an exception's text where it failed.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import safe_get_full_optimizer_state
from torch import nn

from sret_scale.config.ds_config import load_ds_config
from sret_scale.config.run_config import OptimConfig
from sret_scale.train.distributed import leave, ranks_from_environment
from sret_scale.train.engine import deepspeed_internals as internals
from sret_scale.train.engine.engine import Engine, start_communication
from sret_scale.train.engine.optimizer import Optimizer
from sret_scale.train.optim import build_optimizer
from tests.train.update_toy import BATCH, Toy, data


def trained(stage: int, name: str = "") -> Engine:
    """The toy after one whole update, and after the backward pass of the next."""
    model = Toy()
    ds_config = load_ds_config(name or f"zero{stage}")
    ds_config["zero_optimization"]["stage"] = stage
    if stage == 3:
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    optimizer = build_optimizer(model, model.tags(), OptimConfig(learning_rate=0.01))
    engine = Engine(model, optimizer, ds_config, micro_batch_size=BATCH, grad_accum_steps=1)
    for step in range(2):
        x, labels = data(step, 0, ranks_from_environment().rank)
        engine.backward(nn.functional.cross_entropy(engine.forward(x, (0, 1)).float(), labels))
        if step == 0:
            engine.step()
    return engine


def sizes(engine: Engine) -> dict[str, Any]:
    optimizer, stage = engine._optimizer, engine.zero_stage
    flat = internals.flat_weights(optimizer, stage)
    gradients = [internals.averaged_gradients(optimizer, index) for index in range(len(flat))]
    listed = internals.listed_parameters(optimizer, stage)
    return {
        "flat": [value.numel() for value in flat],
        "averaged": [sum(one.numel() for one in tensors) for tensors in gradients],
        "is_gradient_there": any(bool(one.any()) for tensors in gradients for one in tensors),
        "num_listed": sum(map(len, listed)),
        "num_parameters": len(list(engine.model.parameters())),
    }


def places(engine: Engine) -> dict[str, Any]:
    groups = internals.places(engine._optimizer)
    fragments = [internals.own_fragment(value) for group in groups for value, _ in group]
    return {
        "starts": [[start for _, start in group] for group in groups],
        "numels": [[value.numel() for value, _ in group] for group in groups],
        "fragments": fragments,
    }


def linked(engine: Engine) -> bool:
    internals.link_moments(engine._optimizer)
    return all(safe_get_full_optimizer_state(value, "exp_avg") is not None for value in engine.model.parameters())


def cut(engine: Engine) -> list[list[Any]]:
    return [
        [None if fragment is None else fragment.numel(), None if shape is None else list(shape)]
        for value in engine.model.parameters()
        for fragment, shape in [(internals.stage_3_fragment(value), internals.stage_3_shape(value))]
    ]


def added_up(engine: Engine) -> list[float]:
    values = torch.full((3,), float(ranks_from_environment().rank))
    internals.add_up(engine._engine, [values], 2)
    return values.tolist()


def lacks(owner: Any, name: str) -> bool:
    return getattr(owner, name) is None


def main() -> None:
    ranks = ranks_from_environment()
    start_communication(ranks)
    report: dict[str, Any] = {}

    def note(name: str, read: Callable[[], Any]) -> None:
        try:
            report[name] = read()
        except Exception as error:  # Each name is to fail by itself: the test prints the text.
            report[name] = f"{type(error).__name__}: {error}"

    note("build_no_operators", lambda: deepspeed.ops.__compatible_ops__)
    engines = {stage: trained(stage) for stage in (0, 1, 2, 3)}
    note("take_under_zero", lambda: ZERO_SUPPORTED_OPTIMIZERS.count(Optimizer))
    note("leave_reduction", lambda: engines[0]._engine.enable_backward_allreduce)
    note("add_up", lambda: added_up(engines[0]))
    for stage in (1, 2, 3):
        note(f"sizes.{stage}", partial(sizes, engines[stage]))
        note(f"cut.{stage}", partial(cut, engines[stage]))
    for stage in (1, 2):
        note(f"places.{stage}", partial(places, engines[stage]))
        note(f"link_moments.{stage}", partial(linked, engines[stage]))
    for stage in (0, 1):
        scaled = trained(stage, "zero1_autocast_fp16")
        note(f"leave_loss_scaling.{stage}", partial(lacks, scaled._engine, "torch_autocast_z0_gradscaler"))
        if stage:
            note("leave_loss_scaling.optimizer", partial(lacks, scaled._optimizer, "torch_autocast_gradscaler"))
    Path(sys.argv[1], f"{ranks.rank}.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main()
