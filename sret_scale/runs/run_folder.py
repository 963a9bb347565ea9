"""What a run leaves behind: the names of its files, and how each is written.

classes.json        the names of the classes, in the order of their numbers
config.yaml         the resolved configuration; `train` takes it back
tokens.model        the sentencepiece model, where the run reads by one
model.json          preset name and counts (sret_scale.model.describe)
environment.json    command, versions, commit, world size; the machine of rank 0, and of every node
metrics.jsonl       one JSON object a line
checkpoints/        see sret_scale.runs.checkpoint
best.safetensors    the weights of the best evaluation, as `export` writes them
status.json         state (one of STATES), exit code, reason; written by rank 0
lock                held by rank 0 while the run is alive
"""

import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data_pipelines.atomic_files import lock_file, write_whole
from data_pipelines.checked_files import printable, read_checked
from sret_scale import __version__

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_STOPPED = 85
"""A signal stopped the run after it had saved: the same command continues it."""

STATES = ("running", "finished", "stopped", "failed")
RECORDED_PACKAGES = ("torch", "deepspeed", "webdataset", "numpy", "torchvision")


class RunFolder:
    """Paths of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.classes = path / "classes.json"
        self.config = path / "config.yaml"
        self.model = path / "model.json"
        self.tokens = path / "tokens.model"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.best = path / "best.safetensors"
        self.status = path / "status.json"
        self.quarantine = path / "quarantine.jsonl"

    @contextmanager
    def locked(self, name: str = "lock") -> Iterator[None]:
        """Hold the run for this process; ValueError where another process holds it.

        `lock` is rank 0's, `launch.lock` that of the process which starts the ranks.
        """
        with (self.path / name).open("a") as stream:
            try:
                lock_file(stream, fcntl.LOCK_EX | fcntl.LOCK_NB, self.path / name)
            except BlockingIOError as error:
                raise ValueError(
                    f"{self.path} is in use by another running job: wait for it, or use another --run"
                ) from error
            yield

    def record_nodes(self, nodes: list[dict[str, Any]]) -> None:
        """Put what the ranks run on into environment.json: the launching host, which wrote it, may be another kind."""
        known = read_known(self.environment)
        write_json(self.environment, {**known, **nodes[0], "nodes": nodes})

    def write_status(self, state: str, exit_code: int | None, reason: str = "") -> None:
        """Replace status.json in one step, so that a reader never sees half of it."""
        write_json(self.status, {"state": state, "exit_code": exit_code, "reason": reason})


def read_status(folder: RunFolder) -> dict[str, Any]:
    """`state` and `exit_code` as rank 0 left them; empty where it wrote nothing that can be read, which is said."""
    status = read_known(folder.status)
    if not status:
        return {}
    state, code = status.get("state"), status.get("exit_code")
    # A state that is not "finished" is always safe: the run is taken up from its checkpoint.
    return {
        "state": state if state in STATES else "no state that is known",
        "exit_code": code if type(code) is int and 0 <= code < 256 else None,
    }


def read_known(file: Path) -> dict[str, Any]:
    """A JSON object that a run can do without: empty where it is missing, and, with a word of it, where damaged."""
    try:
        return read_checked(file, dict[str, Any], 1 << 24)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        print(f"passed over: {printable(error)}", file=sys.stderr, flush=True)
        return {}


def write_json(file: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    write_whole(file, json.dumps(value, indent=1) + "\n")


def environment(world_size: int) -> dict[str, Any]:
    """Everything about machine and versions that a reader needs to repeat a run. Holds no environment variables."""
    return {
        "command": shlex.join(["sret-scale", *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            "sret-scale": __version__,
            **{name: version(name) for name in RECORDED_PACKAGES},
        },
        **machine(),
        "commit": _commit(),
        "world_size": world_size,
    }


def machine() -> dict[str, Any]:
    """What this process runs on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu_name(), "num_cpus": os.cpu_count(), "gpu": gpu}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str | None:
    """The project's commit, with `+changes` where the tree differs from it; None where it is not a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    run = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty=+changes", "--abbrev=12", "--exclude=*"],
        # A hook of another repository names that one by GIT_DIR.
        env={name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or None
