"""Reads a finished or running run back: its configuration and a model with the weights of its newest checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from torch import nn

from sret_scale.model import SReT, SReTConfig
from sret_scale.train.checkpoint import newest_valid, read_state, read_tensors
from sret_scale.train.config import RunConfig, build, differences_of, from_yaml, to_plain
from sret_scale.train.run_folder import RunFolder

WeightsKind = Literal["raw", "ema"]


def load_config(run: Path) -> RunConfig:
    """The configuration of a run folder; FileNotFoundError saying what was looked for."""
    file = RunFolder(run).config
    if not file.exists():
        raise FileNotFoundError(f"{run} is not a run folder: it has no config.yaml; give the folder that `train` made")
    return from_yaml(file)


def load_model(run: Path, weights: WeightsKind | None, report: Callable[[str], None]) -> tuple[SReT, WeightsKind, int]:
    """(model in eval mode on the CPU, which weights it has, its step); `None` takes the EMA where one is kept."""
    config = load_config(run)
    checkpoint = newest_valid(RunFolder(run).checkpoints, report)
    if checkpoint is None:
        raise FileNotFoundError(f"{run} has no checkpoint yet: train it first")
    state = read_state(checkpoint)
    check_architecture(config.model, state["model"], str(checkpoint))
    tensors = read_tensors(checkpoint, "ema") if weights != "raw" else {}
    if weights == "ema" and not tensors:
        raise ValueError(
            f"{checkpoint} holds no moving average: use the raw weights, or train with optim.ema_horizon_images"
        )
    kind: WeightsKind = "ema" if tensors else "raw"
    model = SReT(config.model)
    model.load_state_dict(tensors or read_tensors(checkpoint, "weights"))
    return model.eval(), kind, int(state["step"])


def load_teacher_run(run: Path) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    """(model, mean, std, image size) of a run, as sret_scale.distill takes a teacher."""
    config = load_config(run)
    model, _, _ = load_model(run, None, print)
    return model, config.train.image_mean, config.train.image_std, config.model.image_size


def check_architecture(expected: SReTConfig, saved: object, where: str) -> None:
    """Raise ValueError, naming what differs, unless a checkpoint's saved model config is `expected`."""
    found = build(SReTConfig, saved, "model")
    changed = differences_of(to_plain(found), to_plain(expected))
    if changed:
        raise ValueError(
            f"{where} was made by another architecture: {'; '.join(changed[:4])} (checkpoint -> configuration); "
            "use another --run, or the configuration of the checkpoint"
        )
