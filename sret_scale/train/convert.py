"""Takes a run's checkpoint to DeepSpeed's universal layout and back, with what only the run folder knows."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipelines.remote.shard_sets import open_training_data
from data_pipelines.stream.loader import LoaderState
from data_pipelines.stream.order import Order, steps_per_epoch
from sret_scale.config.run_config import RunConfig, to_plain
from sret_scale.model import SReT
from sret_scale.runs.checkpoint import list_checkpoints, newest_valid, read_state, save_checkpoint
from sret_scale.runs.run_folder import RunFolder
from sret_scale.train.distributed import saved_buffers
from sret_scale.train.load_run import check_architecture, load_config
from sret_scale.train.universal import export_universal, import_universal


def export_run(run: Path, target: Path) -> Path:
    """Write the newest whole checkpoint of `run` in the universal layout into `target`; returns its folder there."""
    config = load_config(run)
    checkpoint = newest_valid(RunFolder(run).checkpoints, print)
    if checkpoint is None:
        raise FileNotFoundError(f"{run} has no checkpoint yet: train it first")
    exported = export_universal(checkpoint, target, parameters=dict(_model(config).named_parameters()))
    missed = read_state(checkpoint).get("missed_updates")
    if missed:
        # DeepSpeed 0.19.8 refuses parameters of one group with different counts ("Steps ... are not equal").
        name, count = max(missed.items(), key=lambda item: item[1])
        print(
            f"parameters that missed updates: {len(missed)} (most of all {name}: {count}); DeepSpeed counts by group "
            "and will take the updates as made; `checkpoint convert --from` brings the counts back"
        )
    return exported


def import_run(run: Path, source: Path) -> Path:
    """Save the universal checkpoint `source` as the newest of `run`, a folder with a config.yaml; returns its path.

    Clock, data position and moving average are those that an exported run left in it. Where DeepSpeed trained on, they
    follow from its count of samples, and the average begins anew. Raises ValueError where the run is in use, where the
    model is another, or where the run has a checkpoint that would still be newer.
    """
    config, folder = load_config(run), RunFolder(run)
    model = _model(config)
    shapes = {name: value.shape for name, value in model.named_parameters()}
    sets, counters, state = import_universal(source, shapes, saved_buffers(model))
    if state is None:
        state = _state_from_counters(config, counters)
        print(
            f"trained by DeepSpeed up to step {state['step']:,}: clock and data position follow from its count of "
            "samples, the moving average begins anew, and no parameter counts as having missed an update"
        )
    check_architecture(config.model, state["model"], str(source))
    if config.optim.ema_horizon_images and "ema" not in sets:
        sets["ema"] = dict(sets["weights"])
        state = {**state, "ema_updates": 0}
    step = int(state.pop("step"))
    state.pop("format", None)
    with folder.locked():
        newer = [path.name for path in list_checkpoints(folder.checkpoints) if path.name > f"step-{step:09d}"]
        if newer:
            raise ValueError(
                f"{run} has checkpoints of later steps than the imported {step} ({newer[0]}), and would continue from "
                "those: remove them, or import into another run folder"
            )
        return save_checkpoint(folder.checkpoints, step=step, tensors=sets, state=state)


def _model(config: RunConfig) -> nn.Module:
    """For its names, shapes and initial buffers; the caller's random state stays."""
    with torch.random.fork_rng(devices=[]):
        return SReT(config.model)


def _state_from_counters(config: RunConfig, counters: dict[str, Any]) -> dict[str, Any]:
    """Our state for a checkpoint that DeepSpeed wrote by itself: the data position that its samples lead to."""
    step, images, batch = counters["global_steps"], counters["global_samples"], config.train.global_batch_size
    if images != step * batch:
        raise ValueError(
            f"the checkpoint counts {images} samples in {step} steps, which is not train.global_batch_size={batch} "
            "a step: set that to the batch it was trained with"
        )
    shards = open_training_data(config.data)
    order = Order.of(shards, config.data, seed=config.train.seed, global_batch_size=batch)
    per_epoch = steps_per_epoch(order.epoch_length, batch, config.data.last)
    position = LoaderState(epoch=step // per_epoch, position=step % per_epoch * batch)
    return {
        "step": step,
        "images": images,
        "time_s": 0.0,
        "loader": json.dumps(asdict(position)),
        "ema_updates": 0,
        "is_evaluated": True,
        "model": to_plain(config.model),
        "class_names": shards.class_names,
        "teacher": None,
    }
