"""The one door to timm, an optional extra: makes it importable, and builds its models with trained weights."""

import difflib
import importlib
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from data_pipelines.extras import install_extra

# Arguments of `timm.create_model` that lead out of the network.
_OUTSIDE = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


def import_timm() -> ModuleType:
    """timm, on CPU builds of torch too. ValueError with the command to install it when it is missing."""
    # timm imports torchvision, which this module makes importable beside a CPU build of torch.
    importlib.import_module("data_pipelines.image.torchvision_door")
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise ValueError(f"timm is not installed: {install_extra('timm')}") from error


def create_model(name: str, *, num_classes: int, checkpoint: Path | None, channels: int = 3) -> nn.Module:
    """A timm classifier with trained weights: those of a file, or else the published ones of its name.

    With a file the head gets `num_classes`; published weights keep their own head, because a new one would be random.
    The file is read without running code from it. ValueError for an unknown name, or weights that do not fit.
    """
    timm = import_timm()
    check_name(timm, name)
    if checkpoint is None:
        return _published_model(timm, name, channels)
    return with_weights(timm.create_model(name, num_classes=num_classes, in_chans=channels), name, checkpoint)


def make_network(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The network of a name, or of a class such as `MlpMixer`, whose constructor leaves all sizes open.

    ValueError for a name that timm lacks, or an argument that cannot be, or would fetch or read weights.
    """
    # The configuration of a run is data: it must not name a pickle to load, or what to fetch.
    if outside := _OUTSIDE & arguments.keys():
        raise ValueError(f"timm:{name}: {min(outside)} is not taken: weights are given by train.initial_weights")
    timm = import_timm()
    made = getattr(timm.models, name, None)
    if not (isinstance(made, type) and issubclass(made, nn.Module)):
        check_name(timm, name)
        made = partial(timm.create_model, name)
    try:
        try:
            return cast(nn.Module, made(**arguments))
        except TypeError as error:
            if "unexpected keyword argument 'img_size'" not in str(error):
                raise
            # A network of convolutions takes any size.
            return cast(nn.Module, made(**{key: value for key, value in arguments.items() if key != "img_size"}))
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"timm:{name}: {' '.join(str(error).split())[:200]}") from error


def with_weights(model: nn.Module, name: str, checkpoint: Path) -> nn.Module:
    """The model with the weights of a file, read without running code from it; ValueError where they do not fit."""
    state = _read_weights(import_timm(), checkpoint)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason, classes = " ".join(str(error).split())[:300], getattr(model, "num_classes", "its")
        raise ValueError(f"{checkpoint} does not fit {name} with {classes} classes: {reason}") from error
    return model


def create_architecture(name: str, *, num_classes: int | None = None, channels: int = 3) -> nn.Module:
    """A timm classifier on the meta device, without weights; `None` keeps the number of classes of its published ones.

    ValueError for an unknown name.
    """
    classes = {} if num_classes is None else {"num_classes": num_classes}
    with torch.device("meta"):
        return make_network(name, {"in_chans": channels, **classes})


def check_name(timm: ModuleType, name: str) -> None:
    if not timm.is_model(name):
        found = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"timm has no model {name!r}" + (f"; did you mean {' or '.join(found)}?" if found else ""))


def _read_weights(timm: ModuleType, checkpoint: Path) -> Any:
    """The state_dict in a file of torch or safetensors, also one inside a training checkpoint. Runs no code of it."""
    if not checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint file {checkpoint}")
    try:
        return timm.models.load_state_dict(os.fspath(checkpoint), weights_only=True)
    except Exception as error:  # garbage makes the restricted unpickler raise nearly any type
        raise ValueError(
            f"{checkpoint} is damaged or holds more than weights, which could run code; save its state_dict alone"
        ) from error


def preprocessing(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...], int, str]:
    """(mean, std, image size, interpolation) that a timm model was trained with."""
    config = import_timm().data.resolve_model_data_config(model)
    return tuple(config["mean"]), tuple(config["std"]), int(config["input_size"][-1]), str(config["interpolation"])


def _published_model(timm: ModuleType, name: str, channels: int) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, in_chans=channels)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"cannot get the published weights of timm:{name}: {type(error).__name__}; without a network give them as "
            f"timm:{name}?checkpoint=FILE"
        ) from error
    return model
