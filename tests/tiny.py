"""Commands over a run small enough for a test (`benchmarks/tiny_run.py`), and what stands in their environment."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.tiny_run import NUM_IMAGES, TINY_MODEL, tiny_config, tiny_idx, tiny_shards
from sret_scale.config.run_config import RunConfig, to_yaml

__all__ = [
    "CANARY",
    "NUM_IMAGES",
    "ROOT",
    "TINY_MODEL",
    "environment",
    "sret_scale",
    "tiny_config",
    "tiny_idx",
    "tiny_shards",
    "write_config",
]

ROOT = Path(__file__).parents[1]
CANARY = "canary-77b0e2"
"""Stands for a secret in the environment of every command that `sret_scale` starts: it must never be written down."""


def write_config(file: Path, config: RunConfig, **train: object) -> Path:
    """`config`, with some of its train fields changed, as a YAML file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(to_yaml(replace(config, train=replace(config.train, **train))))  # type: ignore[arg-type]
    return file


def environment() -> dict[str, str]:
    """What a command gets: one thread per process, as two ranks share two cores, and a secret to keep."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_API_KEY": CANARY}


def sret_scale(*arguments: str | Path, cwd: Path) -> "subprocess.Popen[str]":
    """The command line, started."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "sret_scale.cli", *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
