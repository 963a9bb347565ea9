"""What tests that start whole runs share: waiting for a step, finding the ranks, the digest of an end."""

import json
import subprocess
import time
from pathlib import Path

import psutil

from sret_scale.train.checkpoint import list_checkpoints, read_state, verify_checkpoint

Process = subprocess.Popen[str]


def wait_for_images(run: Path, images: int, process: Process) -> None:
    """Returns when the run has logged a step at or beyond `images`."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        metrics = run / "metrics.jsonl"
        if metrics.exists() and any(line["images"] >= images for line in complete_lines(metrics)):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step at {images} images within two minutes")


def complete_lines(metrics: Path) -> list[dict[str, float]]:
    text = metrics.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def rank_processes(process: Process) -> list[psutil.Process]:
    tree = psutil.Process(process.pid).children(recursive=True)
    return [child for child in tree if "sret_scale.train.node.rank" in child.cmdline() and child.children() == []]


def digest(run: Path) -> dict[str, str]:
    """SHA-256 of weights, optimiser and average in a run's last checkpoint, and its data position."""
    newest = list_checkpoints(run / "checkpoints")[0]
    verify_checkpoint(newest)
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return {name: files[name]["sha256"] for name in files if name.endswith("safetensors")} | {
        "loader": read_state(newest)["loader"]
    }
