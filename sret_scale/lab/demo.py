"""The demo: the whole way once, on real images that ship with the project.

    IDX files -> shards -> teacher -> student (108 applications, distilled) and control (20) -> report

A smoke test of everything, on 28-pixel images and two CPU cores: it shows that the parts work together and that a deep
recursion learns. It is no evidence about ImageNet.
"""

import json
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import torch

from data_pipelines.index import ShardSet, open_shards
from data_pipelines.write import WriteConfig, write_shards
from sret_scale.lab.baseline import load_pixels, logistic_regression_accuracy
from sret_scale.lab.report import write_report
from sret_scale.train.config import RunConfig
from sret_scale.train.recipes import recipe
from sret_scale.train.start import start_run

# Folder of a run -> recipe. The control is shallow; the rest is the student's.
ROLES = {"teacher": "demo_teacher", "student": "demo_student_108", "control": "demo_control_20"}


def run_demo(output: Path, source: Path | None) -> int:
    """Everything into `output`, skipping what is there; returns 0, or the exit status of the first run that failed.

    `source` is a folder with the four IDX files of a full data set of the MNIST family; None takes the sample.
    """
    started = time.monotonic()
    sets = {split: _shards(output, source, split, started) for split in ("train", "test")}
    for role, name in ROLES.items():
        config = demo_config(name, output, has_teacher=role != "teacher")
        applications = config.model.num_applications
        _say(started, f"{role}: {applications} applications, {config.train.total_images:,} images")
        status = start_run(config, output / role)
        if status:
            return status
    _say(started, "logistic regression on the same images, for comparison")
    baseline = _baseline(sets)
    write_report([output / role for role in ROLES], output / "report.html")
    _say(started, f"report: {output / 'report.html'}")
    for line in summary(output, baseline):
        print(line)
    return 0


def demo_config(name: str, output: Path, *, has_teacher: bool) -> RunConfig:
    """A demo recipe with its folders, and bf16 autocast where the machine has instructions for it."""
    config = recipe(name).config
    shards = output / "shards"
    return replace(
        config,
        data=replace(config.data, train_folder=str(shards / "train"), test_folder=str(shards / "test")),
        distill=replace(config.distill, teacher=f"run:{output / 'teacher'}" if has_teacher else None),
        engine=replace(config.engine, ds_config="zero1_autocast" if has_bf16() else "zero1"),
    )


def has_bf16() -> bool:
    """True where bf16 matrix products are instructions of the machine and not emulated."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _shards(output: Path, source: Path | None, split: str, started: float) -> ShardSet:
    folder = output / "shards" / split
    if not (folder / "manifest.json").exists():
        _say(started, f"shards: {folder}")
        origin = source or Path(str(files("data_pipelines") / "sample" / "fashion_mnist"))
        write_shards(WriteConfig(kind="idx", source=origin, split=split, shard_samples=1000), folder)
    return open_shards(folder)


def _baseline(sets: dict[str, ShardSet]) -> float:
    pixels = {split: load_pixels(shards, 28) for split, shards in sets.items()}
    return logistic_regression_accuracy(pixels["train"], pixels["test"], num_classes=sets["train"].num_classes)


def summary(output: Path, baseline: float) -> list[str]:
    """One line a run: depth, parameters and final accuracy; then the baseline."""
    lines = []
    for role in ROLES:
        counts = json.loads((output / role / "model.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (output / role / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        final = {row["weights"]: row["top1"] for row in rows if row["kind"] == "eval"}
        top1 = final.get("ema", final.get("raw"))
        lines.append(
            f"{role:<8} {counts['applications']:>4} applications  {counts['parameters']:>10,} parameters  "
            f"top-1 {top1:.2%}"
        )
    return [*lines, f"(logistic regression: {baseline:.2%})"]


def _say(started: float, text: str) -> None:
    print(f"[{time.monotonic() - started:4.0f} s] {text}", flush=True)
