"""DeepSpeed's configuration files: finds one by name or path, reads it strictly, and refuses what has no place in it.

They say HOW the engine computes (precision, ZeRO, offload, communication). What is computed (batch, rate, duration) is
the run's configuration. DeepSpeed itself lets an unknown top-level key pass without a word, so the list is ours.
"""

import difflib
import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.checked_files import read_bounded
from sret_scale.config.precision import Precision

# The top-level keys of DeepSpeed 0.19.8 that a file here may set. Every other one is refused.
ALLOWED_KEYS = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "communication_data_type",
        "comms_logger",
        "compile",
        "data_types",
        "disable_allgather",
        "dump_state",
        "flops_profiler",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "prescale_gradients",
        "timers",
        "torch_autocast",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
# The parts of `data_types`; DeepSpeed 0.19.8 lets an unknown one pass. keep_in_fp32_modules speaks of bf16 parameters.
DATA_TYPES = frozenset({"grad_accum_dtype", "param_dtype", "buffer_dtype"})
AUTOCAST_DTYPES: dict[str, Precision] = {"bfloat16": "bf16", "float16": "fp16"}
# Keys that DeepSpeed knows and this project keeps elsewhere -> where, or why not.
REFUSED_KEYS = {
    "train_batch_size": "set train.global_batch_size in the run's configuration",
    "train_micro_batch_size_per_gpu": "set the micro batch in the run's configuration",
    "gradient_accumulation_steps": "set the accumulation in the run's configuration",
    "optimizer": "the optimizer belongs to the run's configuration",
    "scheduler": "the learning-rate schedule belongs to the run's configuration",
    "steps_per_print": "the run's telemetry prints progress",
    "bf16": "bf16 parameters damage the gradients of shared blocks; use torch_autocast, as in zero1_autocast",
    "fp16": "fp16 parameters damage the gradients of shared blocks; use torch_autocast, as in zero1_autocast_fp16",
}


def bundled_ds_configs() -> tuple[str, ...]:
    """The names of the files that ship with the project, such as zero1_autocast."""
    files = importlib.resources.files("ds_configs").iterdir()
    return tuple(sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json")))


def load_ds_config(name_or_path: str | Path) -> dict[str, Any]:
    """The content of a bundled file (by name) or of any JSON file (by path), checked by `check_ds_config`.

    Raises ValueError that names the file and the key, or FileNotFoundError that lists the bundled names.
    """
    name = str(name_or_path)
    bundled = bundled_ds_configs()
    if name in bundled:
        text = importlib.resources.files("ds_configs").joinpath(f"{name}.json").read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = read_bounded(name, 2**20).decode("utf-8-sig", errors="replace")
    else:
        nearest = difflib.get_close_matches(name, bundled, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise FileNotFoundError(
            f"no DeepSpeed config {name!r}: {hint}expected a JSON file or one of {', '.join(bundled)}"
        )
    try:
        config = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"DeepSpeed config {name}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"DeepSpeed config {name}: expected an object of keys, got {type(config).__name__}")
    check_ds_config(config, name)
    return config


def check_ds_config(config: dict[str, Any], name: str) -> None:
    """Raises ValueError for a key without a place here, no stated clipping, or gradients in less than fp32."""
    for key in config:
        if key in REFUSED_KEYS:
            raise ValueError(f"DeepSpeed config {name}: {key!r} is not set here: {REFUSED_KEYS[key]}")
        if key not in ALLOWED_KEYS:
            nearest = difflib.get_close_matches(key, ALLOWED_KEYS, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"allowed are {', '.join(sorted(ALLOWED_KEYS))}"
            raise ValueError(f"DeepSpeed config {name}: unknown key {key!r}; {hint}")
    clipping = config.get("gradient_clipping")
    if isinstance(clipping, bool) or not isinstance(clipping, int | float) or clipping < 0:
        # Left out, DeepSpeed 0.19.8 clips at 1.0 without saying so.
        raise ValueError(
            f"DeepSpeed config {name}: state gradient_clipping (a number >= 0, 0 is off), got {clipping!r}"
        )
    _check_precision(config, name)


def _check_precision(config: dict[str, Any], name: str) -> None:
    autocast = config.get("torch_autocast", {})
    if not isinstance(autocast, dict) or (
        autocast.get("enabled") and autocast.get("lower_precision_safe_modules") != []
    ):
        # By default DeepSpeed reduces the gradients of Linear and Conv layers in bf16.
        raise ValueError(
            f"DeepSpeed config {name}: torch_autocast needs "
            "lower_precision_safe_modules: [] (gradients are reduced in fp32)"
        )
    if autocast.get("enabled") and autocast.get("dtype") not in AUTOCAST_DTYPES:
        raise ValueError(
            f"DeepSpeed config {name}: torch_autocast needs dtype {' or '.join(AUTOCAST_DTYPES)}, got "
            f"{autocast.get('dtype')!r}"
        )
    kinds = config.get("data_types", {})
    if not isinstance(kinds, dict) or set(kinds) - DATA_TYPES:
        raise ValueError(
            f"DeepSpeed config {name}: data_types takes an object of {', '.join(sorted(DATA_TYPES))}, got {kinds!r}"
        )
    stated = {f"data_types.{key}": value for key, value in kinds.items()}
    if "communication_data_type" in config:
        stated["communication_data_type"] = config["communication_data_type"]
    for key, value in stated.items():
        if value != "fp32":
            raise ValueError(
                f"DeepSpeed config {name}: {key} is 'fp32' or left out, got {value!r}: a shared block adds up the "
                "gradients of all its loops, which rounding to 16 bits damages"
            )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"key {key!r} appears twice")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def zero_stage_of(ds_config: Mapping[str, Any]) -> int:
    """The ZeRO stage of a configuration, 0 where it states none."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def is_offloaded(ds_config: Mapping[str, Any]) -> bool:
    """True where the optimiser's state lives in host memory."""
    place = ds_config.get("zero_optimization", {}).get("offload_optimizer", {})
    return bool(place) and place.get("device", "none") != "none"


def precision_of(ds_config: Mapping[str, Any]) -> Precision:
    """What matrix products are computed in; parameters are fp32 in all."""
    autocast = ds_config.get("torch_autocast", {})
    if not autocast.get("enabled"):
        return "fp32"
    return AUTOCAST_DTYPES[autocast["dtype"]]
