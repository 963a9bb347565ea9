"""Does the planned rate of teacher ranks come true? `python -m benchmarks.teacher_ranks`, on a quiet machine.

Two processes train the same student from the same teacher: both with the teacher beside them, or one as student and
one as teacher rank. Predicted from two measured rates (sret_scale.train.teacher_plan), observed in the metrics.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.config.recipes import recipe
from sret_scale.config.run_config import RunConfig, override
from sret_scale.model import SReT, preset
from sret_scale.train.teacher_plan import Rates, measured_rates

ROOT = Path(__file__).parents[1]
MICRO_BATCH = 16
STEPS = 24


def teacher() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    """An untrained SReT of 20 applications: what it answers does not matter here."""
    torch.manual_seed(0)
    return SReT(preset("demo_control_20")), (0.5,) * 3, (0.25,) * 3, preset("demo_control_20").image_size


def changes(shards: Path) -> list[str]:
    """Of the recipe `demo_control_20`."""
    sizes = [f"train.total_images={2 * MICRO_BATCH * STEPS}", f"train.global_batch_size={2 * MICRO_BATCH}"]
    sizes += [f"train.micro_batch_size={MICRO_BATCH}", "train.log_interval_steps=1", "optim.warmup_images=0"]
    data = [f"data.train_folder={shards / 'train'}", f"data.test_folder={shards / 'test'}"]
    return [*sizes, *data, "distill.teacher=module:benchmarks.teacher_ranks:teacher"]


def observed(shards: Path, run: Path, num_teacher_ranks: int) -> float:
    """Median images a second of a run's steps after the first quarter, in which everything warms up."""
    command = [sys.executable, "-m", "sret_scale.cli", "train", "demo_control_20", *changes(shards)]
    command += [f"distill.num_teacher_ranks={num_teacher_ranks}", "--run", str(run), "--ranks", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [line["images_per_s"] for line in lines if line["kind"] == "train"]
    return statistics.median(rates[len(rates) // 4 :])


def compare(config: RunConfig, shards: Path, folder: Path) -> dict[str, Any]:
    """Images a second, predicted and observed."""
    rates: Rates = measured_rates(config)
    rows = {
        "a teacher beside each of 2 students": (rates.beside(2), observed(shards, folder / "beside", 0)),
        "1 student and 1 teacher rank": (rates.of_job([2], 1), observed(shards, folder / "apart", 1)),
    }
    table = {
        name: {"predicted": predicted, "observed": found, "ratio": found / predicted}
        for name, (predicted, found) in rows.items()
    }
    return {"one process alone": {"student": rates.student, "teacher": rates.teacher}, "images/s": table}


def main() -> None:
    """Prints the results and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "teacher_ranks.json")
    args = parser.parse_args()
    source = ROOT / "data_pipelines" / "sample" / "fashion_mnist"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for split in ("train", "test"):
            write_shards(WriteConfig(kind="idx", source=source, split=split, shard_samples=1000), folder / split)
        config = override(recipe("demo_control_20").config, changes(folder))
        result = {
            "command": "OMP_NUM_THREADS=1 python -m benchmarks.teacher_ranks",
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            **compare(config, folder, folder),
        }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
