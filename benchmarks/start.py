"""How long a start takes, and what it asks of a shared file system: `python -m benchmarks.start`.

Three questions: the seconds from the command to the first optimizer step with warm caches, the seconds of each
command's --help, and how many files a rank opens on its way there, since every rank of a job does it at once.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.commands import COMMANDS

ROOT = Path(__file__).parents[1]
OPENED = re.compile(r'openat\([^"]*"(?P<path>[^"]+)"[^)]*\) = (?P<result>-?\d+)')


def train_command(shards: Path, run: Path, ranks: int) -> list[str]:
    """A run of three steps on the shipped sample."""
    sizes = ["train.total_images=96", "train.global_batch_size=32", "train.micro_batch_size=16"]
    fields = [*sizes, "optim.warmup_images=0", "train.log_interval_steps=1"]
    data = [f"data.train_folder={shards / 'train'}", f"data.test_folder={shards / 'test'}"]
    command = [sys.executable, "-m", "sret_scale.cli", "train", "demo_control_20", *fields, *data]
    return [*command, "--run", str(run), "--ranks", str(ranks)]


def first_step_s(command: list[str], run: Path) -> float:
    """Seconds until the first step stands in the run's metrics."""
    began_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and '"train"' in metrics.read_text(encoding="utf-8")):
        if process.poll() not in (None, 0):
            raise RuntimeError(f"the run failed with status {process.returncode}")
        time.sleep(0.01)
    seconds = time.perf_counter() - began_s
    process.wait()
    return seconds


def help_s(command: str, repeats: int) -> float:
    """Median seconds of a command's --help."""
    times = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "sret_scale.cli", command, "--help"], check=True, capture_output=True, cwd=ROOT
        )
        times.append(time.perf_counter() - began_s)
    return statistics.median(times)


SHARED = ("environment", "project", "run folder", "shards")
"""What lies on the folder that all nodes share."""


def kind_of(path: str, shards: Path, run: Path) -> str:
    """Whose file it is."""
    places = {str(run): "run folder", str(shards): "shards", sys.prefix: "environment", str(ROOT): "project"}
    return next((kind for part, kind in places.items() if path.startswith(part)), "system")


def counts(files: list[Path], shards: Path, run: Path) -> dict[str, dict[str, int]]:
    """Files that processes opened and looked for in vain, by whose they are."""
    found: dict[str, Counter[str]] = {"opened": Counter(), "not found": Counter()}
    for file in files:
        for match in OPENED.finditer(file.read_text(errors="replace")):
            outcome = "opened" if int(match["result"]) >= 0 else "not found"
            found[outcome][kind_of(match["path"], shards, run)] += 1
    return {outcome: dict(kinds) for outcome, kinds in found.items()}


def opened_files(folder: Path, shards: Path) -> dict[str, Any]:
    """What a rank of two opens, what its node's agent and launcher do, and what that makes for 128 ranks (strace)."""
    run, trace = folder / "traced", folder / "trace"
    command = ["strace", "-ff", "-f", "-y", "-s", "4096", "-e", "trace=openat,execve", "-o", str(trace)]
    command += train_command(shards, run, 2)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    texts = {file: file.read_text(errors="replace") for file in sorted(folder.glob(f"{trace.name}.*"))}
    ranks = [file for file, text in texts.items() if f"{run}/logs/rank-" in text]
    node = [
        file for file, text in texts.items() if "launch.agent" in text[:4096] or "deepspeed.launcher" in text[:4096]
    ]
    rank, others = counts(ranks[1:2], shards, run), counts(node, shards, run)
    shared = [sum(found["opened"].get(kind, 0) for kind in SHARED) for found in (rank, others)]
    return {
        "a rank": rank,
        "agent and DeepSpeed's launcher of a node": others,
        "on the shared folder, 128 ranks on 16 nodes": 128 * shared[0] + 16 * shared[1],
    }


def main() -> None:
    """Prints the results and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "start.json")
    args = parser.parse_args()
    source = ROOT / "data_pipelines" / "sample" / "fashion_mnist"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards = folder / "data"
        for split in ("train", "test"):
            write_shards(WriteConfig(kind="idx", source=source, split=split, shard_samples=1000), shards / split)
        times: dict[str, list[float]] = {"1 rank": [], "2 ranks": []}
        for index in range(args.repeats + 1):
            for ranks, seconds in zip((1, 2), times.values(), strict=True):
                run = folder / f"run-{index}-{ranks}"
                seconds.append(first_step_s(train_command(shards, run, ranks), run))
        result = {
            "command": "python -m benchmarks.start",
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            # The first round warms the caches.
            "seconds to the first step (median)": {key: statistics.median(value[1:]) for key, value in times.items()},
            "seconds of --help (median)": {command: help_s(command, args.repeats) for command in COMMANDS},
            "files opened": opened_files(folder, shards) if shutil.which("strace") else "no strace here",
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
