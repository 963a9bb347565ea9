"""What tests that start whole runs share: waiting for a step, finding the ranks, the digest of an end."""

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from sret_scale.runs.checkpoint import list_checkpoints, read_state, verify_checkpoint
from tests.tiny import ROOT

Process = subprocess.Popen[str]


def metrics_bytes(run: Path) -> int:
    """How long the log is now; taken before a start, it is the `after` of what that start writes."""
    metrics = run / "metrics.jsonl"
    return metrics.stat().st_size if metrics.exists() else 0


def wait_for_images(run: Path, images: int, process: Process, *, after: int = 0) -> None:
    """Returns when the run has logged a step at or beyond `images` behind the first `after` bytes of its log."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        metrics = run / "metrics.jsonl"
        if metrics.exists() and any(line["images"] >= images for line in complete_lines(metrics, after=after)):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step at {images} images within two minutes")


def complete_lines(metrics: Path, *, after: int = 0) -> list[dict[str, Any]]:
    text = metrics.read_bytes()[after:].decode()
    # A start ends the line that a kill cut off, so what it writes may begin with an empty one.
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]


def rank_processes(process: Process) -> list[psutil.Process]:
    def is_named(child: psutil.Process) -> bool:
        return "sret_scale.launch.rank_bootstrap" in child.cmdline()

    # DeepSpeed's launcher has the name among its arguments; a rank may have children of another kind.
    tree = psutil.Process(process.pid).children(recursive=True)
    return [child for child in tree if is_named(child) and not any(map(is_named, child.children()))]


def digest(run: Path) -> dict[str, str]:
    """SHA-256 of weights, optimiser and average in a run's last checkpoint, and its data position."""
    return digest_of(list_checkpoints(run / "checkpoints")[0])


def digest_of(checkpoint: Path) -> dict[str, str]:
    """The same of one checkpoint."""
    verify_checkpoint(checkpoint)
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: files[name]["sha256"] for name in files if name.endswith("safetensors")} | {
        "loader": read_state(checkpoint)["loader"]
    }


def run_two_ranks(module: str, *arguments: str | Path) -> None:
    """`python -m MODULE ARGUMENTS` as two gloo ranks on this machine, without a launcher; both must end well.

    They are forks of one process for all tests (`tests.ranks.rank_server`), and see the environment as it is
    at the call.
    """
    run_ranks(2, module, *arguments)


def run_ranks(world_size: int, module: str, *arguments: str | Path, timeout_s: float = 300) -> None:
    """The same for any number of ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    with tempfile.TemporaryDirectory() as name:
        errors = [Path(name) / f"rank{rank}" for rank in range(world_size)]
        job = {
            "module": module,
            "arguments": list(map(str, arguments)),
            "environment": {**shared, "MASTER_PORT": str(port)},
            "folder": str(ROOT),
            "ranks": [
                {
                    "environment": {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    "output": os.devnull,
                    "errors": str(file),
                }
                for rank, file in enumerate(errors)
            ],
        }
        statuses = ask_rank_server(job, timeout_s)
        assert not any(statuses), "".join(file.read_text()[-3000:] for file in errors)


def ask_rank_server(job: dict[str, Any], timeout_s: float) -> list[int]:
    """The exit statuses of a job's ranks; one that takes longer is ended with all its processes.

    job: `module`, `arguments`, `environment` and `folder` of all ranks, and of each of its `ranks` an `environment` and
    the files `output` and `errors`.
    """
    server = _rank_server()
    assert server.stdin and server.stdout
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    if not select.select([server.stdout], [], [], timeout_s)[0]:
        _rank_server.cache_clear()
        os.killpg(server.pid, signal.SIGKILL)
        raise TimeoutError(f"{job['module']} took longer than {timeout_s:.0f} s")
    statuses: list[int] = json.loads(server.stdout.readline())
    return statuses


@functools.cache
def _rank_server() -> Process:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.ranks.rank_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    # It ends with the end of its input.
    atexit.register(server.communicate)
    return server
