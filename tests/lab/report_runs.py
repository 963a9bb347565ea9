"""Writes synthetic run folders in exactly the format that `train` writes: plausible curves, no training."""

import copy
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

Lines = list[dict[str, Any]]

CONFIG: dict[str, Any] = {
    "model": {
        "image_size": 28,
        "num_classes": 10,
        "stem_strides": [2, 1, 1],
        "stages": [
            {"width": 32, "num_blocks": 2, "num_loops": 2, "num_groups": [4, 1]},
            {"width": 64, "num_blocks": 5, "num_loops": 2, "num_groups": [2, 1]},
            {"width": 128, "num_blocks": 3, "num_loops": 2, "num_groups": [1, 1]},
        ],
        "drop_path": 0.05,
        "branch_scheme": "published",
    },
    "data": {"train": "shards/fashion/train", "test": "shards/fashion/test"},
    "augment": {"mixup": 0.1, "cutmix": 0.0},
    "memory": {"schedule": "binomial", "slots": 8},
    "distill": {"teacher": None, "temperature": 1.0},
    "optim": {"learning_rate": 0.001, "weight_decay": 0.05, "ema_horizon_images": 4000},
    "engine": {"ds_config": "zero1_autocast"},
    "train": {"seed": 0, "total_images": 26000, "global_batch_size": 64, "micro_batch_size": 32},
}
ENVIRONMENT: dict[str, Any] = {
    "versions": {"sret-scale": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8", "python": "3.11.9"},
    "cpu": "AMD EPYC 9654",
    "num_cpus": 2,
    "gpu": None,
    "commit": "91d0e26c4b1f5a7d",
    "world_size": 2,
}
TELEMETRY_LISTS = [
    "branch_ratio",
    "step_ratio",
    "token_cosine",
    "rank_ratio",
    "attention_entropy",
    "max_abs",
    "gradient_norm",
]


def write_run(
    folder: Path,
    *,
    num_loops: int = 2,
    final_top1: float = 0.84,
    teacher: str | None = None,
    seed: int = 0,
    images: int = 26_000,
    has_telemetry: bool = False,
    edit: Callable[[Lines], Lines] = lambda lines: lines,
) -> Path:
    """A finished run of 10 * `num_loops` applications; `edit` may change its metric lines before they are written."""
    folder.mkdir(parents=True)
    config = copy.deepcopy(CONFIG)
    for stage in config["model"]["stages"]:
        stage["num_loops"] = num_loops
    config["distill"]["teacher"] = teacher
    config["train"]["seed"] = seed
    applications = 10 * num_loops
    model = {
        "preset": "demo",
        "applications": applications,
        "residual_sublayers": 3 * applications,
        "weight_layers": 6 * applications,
        "parameters": 310_000 + 2_900 * applications,
        "macs": 1_150_000 * applications,
    }
    command = ["sret-scale", "train", "demo", f"model.stages.1.num_loops={num_loops}", f"run={folder.name}"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "model.json").write_text(json.dumps(model))
    (folder / "environment.json").write_text(json.dumps({**ENVIRONMENT, "command": shlex.join(command)}))
    (folder / "status.json").write_text(json.dumps({"state": "finished", "exit_code": 0, "reason": ""}))
    lines = metric_lines(applications, final_top1, images, seed)
    lines = edit(lines + telemetry_lines(lines, config["model"]["stages"]) if has_telemetry else lines)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def metric_lines(applications: int, final_top1: float, images: int, seed: int) -> Lines:
    """Metric lines of a run: a training line every 2 steps, 8 evaluations, memory at the end."""
    rng = np.random.default_rng(seed + applications)
    batch, speed = 64, 6000 / applications
    steps = images // batch
    lines: Lines = []
    for step in range(2, steps + 1, 2):
        progress = step / steps
        base = {"step": step, "images": step * batch, "epoch": step * batch // 10_000, "time_s": step * batch / speed}
        loss = 0.45 + 1.85 * math.exp(-5 * progress) + 0.06 * float(rng.standard_normal())
        measured = {"lr": 1e-3 * (1 - progress), "grad_norm": 1.1, "images_per_s": speed * float(rng.uniform(0.9, 1.1))}
        lines.append({"kind": "train", **base, "loss": loss, **measured})
        if step % max(2, steps // 16 * 2) == 0 or step + 2 > steps:
            for weights, lag in (("raw", 5.0), ("ema", 3.5)):
                top1 = final_top1 * (1 - math.exp(-lag * progress)) + (0.004 if weights == "ema" else 0.0)
                scores = {"top1": top1, "top5": min(1.0, top1 + 0.14), "loss": 1.6 - 1.35 * top1}
                where = {"split": "test", "weights": weights, "num_samples": 2000, "images_per_s": 3 * speed}
                lines.append({"kind": "eval", **base, **where, **scores})
    memory = {"peak_rss_bytes": 620 * 2**20 + applications * 2**20, "peak_device_bytes": None}
    lines.append({"kind": "memory", **base, **memory, "predicted_activation_bytes": (40 + applications // 4) * 2**20})
    return lines


def telemetry_lines(lines: Lines, stages: Sequence[Mapping[str, int]]) -> Lines:
    """A probe at every tenth training line, as docs/depth.md describes it."""
    found: Lines = []
    for line in [line for line in lines if line["kind"] == "train"][::10]:
        clock = {key: line[key] for key in ("step", "images", "epoch", "time_s")}
        blocks = []
        for index, stage in enumerate(stages):
            for block in range(stage["num_blocks"]):
                loops = list(range(stage["num_loops"]))
                grown = [(1 + 0.02 * (loop + block)) * (1 + line["step"] / 1e4) for loop in loops]
                one = {"stage": index, "block": block, "num_loops": len(loops), "loops": loops, "rms": grown}
                one |= {name: [0.1 + 0.01 * loop for loop in loops] for name in TELEMETRY_LISTS}
                blocks.append(one | {"gradient_cosine": [*[0.5] * (len(loops) - 1), None], "gradient_agreement": 0.3})
        alarms = ["stage 2 grows 1.3-fold a loop"] if line["step"] > 100 else []
        found.append(
            {"kind": "telemetry", **clock, "probe_s": 0.1, "num_images": 4, "blocks": blocks, "alarms": alarms}
        )
    return found
