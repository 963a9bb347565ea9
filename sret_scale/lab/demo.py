"""The demo: the whole way once, on real images that ship with the project.

    IDX files -> shards -> teacher -> student (108 applications, distilled) and control (20) -> report

A smoke test of everything, on 28-pixel images and two CPU cores: it shows that the parts work together and that a deep
recursion learns. It is no evidence about ImageNet.
"""

import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import torch

from data_pipelines.shards.index import ShardSet, open_shards
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.config.recipes import recipe
from sret_scale.config.run_config import RunConfig
from sret_scale.lab.baseline import load_pixels, logistic_regression_accuracy
from sret_scale.lab.report.page import write_report
from sret_scale.lab.report.run_record import RunRecord, load_run
from sret_scale.launch.nodes import choose_nodes
from sret_scale.launch.preflight import start_run

# What the student must reach on the sample, besides beating logistic regression, for the demo to count as passed.
STUDENT_TOP1 = 0.82
# Folder of a run -> recipe. The control is shallow; the rest is the student's.
ROLES = {"teacher": "demo_teacher", "student": "demo_student_108", "control": "demo_control_20"}


def run_demo(output: Path, source: Path | None) -> int:
    """Everything into `output`, skipping what is there; returns 0, the exit status of the first run that failed, or 1
    when the student of the sample data learned too little.

    `source` is a folder with the four IDX files of a full data set of the MNIST family; None takes the sample.
    """
    started = time.monotonic()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot make the demo's folder {output}: {error.strerror}; choose another --output"
        raise OSError(error.errno, reason) from error
    origin = source or Path(str(files("data_pipelines") / "sample" / "fashion_mnist"))
    sets = {split: _shards(output, origin, split, started) for split in ("train", "test")}
    world_size = sum(choose_nodes().ranks_of_nodes)
    for role, name in ROLES.items():
        config = demo_config(name, output, world_size=world_size, has_teacher=role != "teacher")
        applications = config.model.num_applications
        _say(started, f"{role}: {applications} applications, {config.train.total_images:,} images")
        status = start_run(config, output / role)
        if status:
            return status
    _say(started, "logistic regression on the same images, for comparison")
    baseline = _baseline(sets)
    runs = {role: load_run(output / role) for role in ROLES}
    top1 = {role: _top1(run) for role, run in runs.items()}
    is_enough = top1["student"] >= max(baseline, STUDENT_TOP1)
    note = (
        "A smoke test of every part on small images, no evidence about ImageNet. Logistic regression on the same "
        f"pixels reaches {baseline:.2%}."
    )
    write_report([output / role for role in ROLES], output / "report.html", note=note)
    _say(started, f"report: {output / 'report.html'}")
    _say(started, note)
    if not is_enough and source is None:
        _say(started, f"FAILED: expected {max(baseline, STUDENT_TOP1):.2%} of the student, got {top1['student']:.2%}")
    for role, run in runs.items():
        print(
            f"{role:<8} {run.model['applications']:>4} applications  {run.model['parameters']:>10,} parameters  "
            f"top-1 {top1[role]:.2%}"
        )
    return 0 if is_enough or source is not None else 1


def demo_config(name: str, output: Path, *, world_size: int, has_teacher: bool) -> RunConfig:
    """A demo recipe with its folders, a batch that the ranks divide, and bf16 autocast on GPUs that have it."""
    config = recipe(name).config
    shards = output / "shards"
    global_batch_size = world_size * max(1, round(config.train.global_batch_size / world_size))
    per_rank = global_batch_size // world_size
    # The largest micro-batch up to the recipe's that divides a rank's part.
    # On CPUs the demo's small products take 1.3 times as long under autocast, also where bf16 is an instruction.
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    micro_batch_size = max(size for size in range(1, config.train.micro_batch_size + 1) if per_rank % size == 0)
    return replace(
        config,
        data=replace(config.data, train_folder=str(shards / "train"), test_folder=str(shards / "test")),
        distill=replace(config.distill, teacher=f"run:{output / 'teacher'}" if has_teacher else None),
        engine=replace(config.engine, ds_config="zero1_autocast" if has_bf16 else "zero1"),
        train=replace(config.train, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size),
    )


def _shards(output: Path, source: Path, split: str, started: float) -> ShardSet:
    folder = output / "shards" / split
    _say(started, f"shards: {folder}")
    # A complete set of the same source is left as it is; one of another source is an error.
    write_shards(WriteConfig(kind="idx", source=source, split=split, shard_samples=1000), folder)
    return open_shards(folder)


def _baseline(sets: dict[str, ShardSet]) -> float:
    pixels = {split: load_pixels(shards, 28) for split, shards in sets.items()}
    return logistic_regression_accuracy(pixels["train"], pixels["test"], num_classes=sets["train"].num_classes)


def _top1(run: RunRecord) -> float:
    """The final accuracy: of the moving average, which the demo's runs keep."""
    value = run.last("eval", "top1", weights="ema")
    assert value is not None, "a finished run has been evaluated"
    return value


def _say(started: float, text: str) -> None:
    print(f"[{time.monotonic() - started:4.0f} s] {text}", flush=True)
