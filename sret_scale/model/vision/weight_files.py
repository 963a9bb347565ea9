"""Weights on disk: safetensors with the config beside them (native), and published checkpoints, read without running
any code of theirs."""

import errno
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipelines.atomic_files import replacing
from data_pipelines.checked_files import parse_checked
from sret_scale.model.config import StackConfig, StageConfig
from sret_scale.model.stack import StackModel


def config_from_dict(fields: dict[str, Any]) -> StackConfig:
    """The config that `dataclasses.asdict` was made of; ValueError for a field that is unknown or wrong."""
    every: list[Any] = [StackConfig]
    for one in every:
        every += one.__subclasses__()
    kinds = {one.__dataclass_fields__["kind"].default: one for one in every if "kind" in one.__dataclass_fields__}
    try:
        stages = tuple(StageConfig(**stage) for stage in fields["stages"])
        return kinds[fields.get("kind", "vision")](**{**fields, "stages": stages})
    except (TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a model config: {error}") from error


def save_model(model: StackModel, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write weights, config and, as JSON, whatever else goes with them; the file is complete or absent."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    metadata = {name: json.dumps(value) for name, value in (facts or {}).items()}
    metadata |= {"format": "pt", "sret_config": json.dumps(asdict(model.config))}
    with replacing(path) as file:
        try:
            save_file(state, file.name, metadata=metadata)
        except SafetensorError as error:
            # Its way to report what the disk refused.
            raise OSError(errno.EIO, str(error), str(path)) from error


def load_model(path: Path) -> StackModel:
    """The model of a native file, in evaluation mode, strictly: every tensor used, none missing."""
    state: dict[str, Tensor] = {}
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 - the file is not a mapping
                # Into memory of its own: at odd addresses, as in the file, AVX2's products may round otherwise.
                state[name] = file.get_tensor(name).clone()
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    if "sret_config" not in metadata:
        raise ValueError(f"{path} has no model config; was it written by `sret-scale weights import`?")
    try:
        config = config_from_dict(parse_checked(metadata["sret_config"].encode(), dict[str, Any], "sret_config"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with torch.device("meta"):
        # Nothing is allocated for a config before the tensors that it asks for are seen to be there.
        model = config.build()
    try:
        model.load_state_dict(state, strict=True, assign=True)
        if any(buffer.is_meta for buffer in model.buffers()):
            # What follows from the config is in no file.
            with torch.random.fork_rng(devices=[]):
                model = config.build()
            model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit their config: {str(error).splitlines()[-1]}") from error
    return model.eval()


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors."""
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    return metadata


class _Inert:
    """Stands for an object that training codes keep beside the weights: takes all that its pickle gives, does nothing.

    Not the classes themselves: numpy's dtype, for one, is built from bytes of the file.
    """

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_BESIDE_WEIGHTS: list[Any] = [
    (_Inert, name)
    for name in (
        "argparse.Namespace",
        # Python 3.13 calls the module of its paths so.
        *(f"pathlib{where}.{name}" for where in ("", "._local") for name in ("Path", "PosixPath", "WindowsPath")),
        "numpy.dtype",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
    )
]

# Where training codes put a state dict: timm's and DeiT's average first, as it is what they evaluate; then DeiT's model
# and FKD's. DataParallel and torch.compile put a word before every key.
_STATE_KEYS = ("state_dict_ema", "model_ema", "model", "state_dict")
_PREFIXES = ("module.", "_orig_mod.")


def load_published(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """(state dict, its key in the file) of a published checkpoint: bare (None), or one of a training code.

    A moving average goes before the trained weights. A pickle that would run code is refused before it does.
    """
    _require_file(path)
    try:
        with torch.serialization.safe_globals(_BESIDE_WEIGHTS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # garbage makes the restricted unpickler raise nearly any type
        # torch's own words end with how to run the code in it after all.
        reason = str(error).splitlines()[0].partition(". In PyTorch")[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a checkpoint of plain tensors (nothing in it was run): {reason}") from error
    is_mapping = isinstance(content, dict)
    key = next((name for name in _STATE_KEYS if is_mapping and isinstance(content.get(name), dict)), None)
    state = content[key] if key else content
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path} holds no state dict: expected tensors by name, or those under {', '.join(_STATE_KEYS)}"
        )
    while prefix := next((word for word in _PREFIXES if all(name.startswith(word) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state, key


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}" + (", which is a folder" if path.is_dir() else ""))
