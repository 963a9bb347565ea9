"""Checkpoints in DeepSpeed's universal layout, written for and read from runs that DeepSpeed makes by itself.

    latest_universal                      the name of the folder below
    TAG/mp_rank_00_model_states.pt        weights and buffers under "module", counters, and our own state
    TAG/zero_pp_rank_0_mp_rank_00_...     the counters again, by the name that ZeRO 3 looks for
    TAG/zero/optimizer_state.pt           parameter groups
    TAG/zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt

The layout is that of deepspeed/checkpoint/ds_to_universal.py and universal_checkpoint.py (DeepSpeed 0.19.8). Its files
are pickles; they are read by torch's restricted loader, which refuses whatever could run code.
"""

import contextlib
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sret_scale.runs.checkpoint import read_state, read_tensors, verify_checkpoint

MODEL_FILE = "mp_rank_00_model_states.pt"
ZERO_3_MODEL_FILE = "zero_pp_rank_0_mp_rank_00_model_states.pt"
OURS = "sret_scale"
"""Key of our own state in the model file; DeepSpeed hands unknown keys on as its `client_state`."""
OUR_SETS = ("ema", "ema_statistics")
"""What DeepSpeed has no place for: the moving average, and BatchNorm's statistics measured for it."""


def export_universal(checkpoint: Path, folder: Path, *, parameters: Iterable[str]) -> Path:
    """Write one of our checkpoints as `folder/STEP`, with `latest_universal` beside it; returns that path.

    `parameters` are the names of the model's trained parameters; other weights are buffers. Moments of any name go
    along. DeepSpeed restores no buffers from this layout: they are in the model file, under "module".
    Raises CheckpointError for a damaged source, FileExistsError where the target is there already.
    """
    verify_checkpoint(checkpoint)
    state = read_state(checkpoint)
    weights, optimizer = read_tensors(checkpoint, "weights"), read_tensors(checkpoint, "optimizer")
    if not optimizer:
        raise ValueError(f"{checkpoint} was saved before the first step: it has no optimizer state to export")
    target = folder / checkpoint.name
    if target.exists():
        raise FileExistsError(f"{target} is there already: remove it, or convert into another folder")
    partial = target.with_name(f"{target.name}.tmp")
    # Of an export that was broken off.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    names = list(parameters)
    for name in names:
        values = {"fp32": weights[name], **_moments_of(name, optimizer)}
        (partial / "zero" / name).mkdir(parents=True)
        for kind, value in values.items():
            # A copy, because a view would take its whole storage with it.
            torch.save({"param": value.clone()}, partial / "zero" / name / f"{kind}.pt")
        torch.save(optimizer["step"].clone(), partial / "zero" / name / "step.pt")
    torch.save(_optimizer_file(optimizer["step"], len(names)), partial / "zero" / "optimizer_state.pt")
    counters = _counters(state)
    ours = {name: read_tensors(checkpoint, name) for name in OUR_SETS}
    torch.save({**counters, "module": weights, OURS: {"state": state, **ours}}, partial / MODEL_FILE)
    torch.save({**counters, "module": {}}, partial / ZERO_3_MODEL_FILE)
    partial.rename(target)
    (folder / "latest_universal").write_text(target.name)
    return target


def _moments_of(name: str, optimizer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.partition(".")[0]: value for key, value in optimizer.items() if key.partition(".")[2] == name}


def _optimizer_file(step: Tensor, num_groups: int) -> dict[str, Any]:
    # Empty groups leave the rates of the loading optimizer as they are. DeepSpeed pairs these groups with its own and
    # skips what has no partner, its moments too: one for each parameter is enough for any grouping.
    groups: list[dict[str, Any]] = [{} for _ in range(num_groups)]
    for_zero_3 = {"state": {0: {"step": step.clone()}}, "param_groups": groups}
    return {"ds_version": version("deepspeed"), "param_groups": groups, "optimizer_state_dict": for_zero_3}


def _counters(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "global_steps": state["step"],
        "global_samples": state["images"],
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "lr_scheduler": None,
        "optimizer": None,
        "ds_config": {},
        "ds_version": version("deepspeed"),
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
    }


def import_universal(
    folder: Path, shapes: Mapping[str, torch.Size], buffers: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], dict[str, Any] | None]:
    """(sets of tensors as in our checkpoints, DeepSpeed's counters, our own state where it is from the same step).

    `folder` is a TAG folder or the one with `latest_universal`. `shapes` are of the model's trained parameters;
    `buffers` are taken where the model file has none. Raises ValueError naming the file that is missing or wrong.
    """
    folder = _tag_folder(folder)
    model = _read_model_file(folder)
    steps, weights, optimizer = set(), {}, {}
    for name, shape in shapes.items():
        for kind, value in _read_parameter(folder / "zero" / name, shape):
            if kind == "step":
                steps.add(float(value))
            elif kind == "fp32":
                weights[name] = value
            else:
                optimizer[f"{kind}.{name}"] = value
    if len(steps) > 1:
        raise ValueError(f"{folder / 'zero'}: parameters of different optimizer steps {sorted(steps)}")
    # ZeRO 3 writes no step.pt; its steps are those that the engine counted and did not skip.
    step = steps.pop() if steps else float(model["global_steps"] - model["skipped_steps"])
    optimizer["step"] = torch.tensor(step)
    saved = model["module"] if isinstance(model.get("module"), dict) else {}
    for name, value in buffers.items():
        weights[name] = _checked(saved[name], value.shape, folder / MODEL_FILE) if name in saved else value.clone()
    sets = {"weights": weights, "optimizer": optimizer}
    ours = model.get(OURS)
    if not isinstance(ours, dict) or ours["state"]["step"] != model["global_steps"]:
        return sets, model, None
    # An export of an earlier version may lack one of them.
    sets |= {name: ours[name] for name in OUR_SETS if ours.get(name)}
    return sets, model, ours["state"]


def _tag_folder(folder: Path) -> Path:
    latest = folder / "latest_universal"
    folder = folder / latest.read_text(encoding="utf-8").strip() if latest.is_file() else folder
    if not (folder / "zero").is_dir():
        raise FileNotFoundError(
            f"{folder} is no universal checkpoint: it has no folder zero/; one that DeepSpeed saved is converted by "
            "python -m deepspeed.checkpoint.ds_to_universal --input_folder ... --output_folder ..."
        )
    return folder


def _read_model_file(folder: Path) -> dict[str, Any]:
    files = [file for name in (MODEL_FILE, ZERO_3_MODEL_FILE) if (file := folder / name).is_file()]
    if not files:
        raise FileNotFoundError(f"{folder} has neither {MODEL_FILE} nor {ZERO_3_MODEL_FILE}")
    value = read_safely(files[0])
    if not isinstance(value, dict) or not all(
        isinstance(value.get(key), int) for key in ("global_steps", "skipped_steps", "global_samples")
    ):
        raise ValueError(f"{files[0]}: expected a dict with whole numbers global_steps, global_samples, skipped_steps")
    return value


def _read_parameter(folder: Path, shape: torch.Size) -> Iterator[tuple[str, Tensor]]:
    if not (folder / "fp32.pt").is_file():
        raise FileNotFoundError(f"{folder / 'fp32.pt'} is missing: the checkpoint is of another model, or incomplete")
    for file in sorted(folder.glob("*.pt")):
        value = read_safely(file)
        if file.stem == "step":
            yield "step", torch.as_tensor(value)
            continue
        yield file.stem, _checked(value.get("param") if isinstance(value, dict) else value, shape, file)


def _checked(value: object, shape: torch.Size, file: Path) -> Tensor:
    # ZeRO 3's files are flat.
    if not isinstance(value, Tensor) or value.numel() != shape.numel():
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{file}: expected a tensor of shape {tuple(shape)}, found {found}")
    value = value.detach().view(shape)
    return value.float() if value.is_floating_point() else value


def read_safely(file: Path) -> Any:
    """What torch's restricted loader makes of a file; ValueError where it would take more than data to make it."""
    try:
        with contextlib.closing(file.open("rb")) as stream:
            return torch.load(stream, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{file} is not read: it is damaged, or holds more than tensors and numbers: {reason}"
        ) from error
