"""A sweep as a Slurm job array: one task a run, each the same command, so that a requeued task continues its run."""

import os
from collections.abc import Sequence
from pathlib import Path

from sret_scale.launch.sbatch import BatchOptions, batch_file

_KEYS = {"time": "time", "cpus": "cpus_per_node", "gpus": "gpus_per_node", "partition": "partition"}
_KEYS |= {"account": "account", "name": "job_name"}


def array_file(options: str, experiment: Sequence[str], folder: Path, *, num_runs: int, jobs: int) -> str:
    """The text for sbatch: tasks 0 to num_runs - 1, at most `jobs` at once, each on one node.

    `experiment` is its file and what changes it. `options` is `time=12:00:00,cpus=12,gpus=1` and so on; ValueError for
    a key or a value that is not one.
    """
    if jobs < 1:
        raise ValueError(f"--jobs: expected at least 1, got {jobs}")
    given: dict[str, str | int] = {"job_name": Path(experiment[0]).stem, "gpus_per_node": 0}
    for part in filter(None, options.split(",")):
        key, _, value = part.partition("=")
        if key not in _KEYS or not value:
            raise ValueError(f"--slurm: expected KEY=VALUE with a key of {', '.join(_KEYS)}, got {part!r}")
        name = _KEYS[key]
        is_count = name in ("cpus_per_node", "gpus_per_node")
        if is_count and not value.isdecimal():
            raise ValueError(f"--slurm: {key} must be a number, got {value!r}")
        given[name] = int(value) if is_count else value
    missing = [key for key in ("time", "cpus") if _KEYS[key] not in given]
    if missing:
        raise ValueError(f"--slurm: {missing[0]} is not given, for example time=12:00:00,cpus=12,gpus=1")
    arguments = ["sweep", *experiment, "--folder", str(folder), "--array-task"]
    text = batch_file(BatchOptions(nodes=1, **given), arguments)  # type: ignore[arg-type]
    first, rest = text.split("\n", 1)
    return f"{first}\n#SBATCH --array=0-{num_runs - 1}%{jobs}\n{rest}"


def array_task(num_runs: int) -> int:
    """Which run this task of the array is; ValueError outside an array, or in one of another experiment."""
    text = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if not text.isdecimal():
        raise ValueError(
            "--array-task: expected SLURM_ARRAY_TASK_ID to be set; submit the batch file that --slurm prints"
        )
    if int(text) >= num_runs:
        raise ValueError(f"--array-task: task {text} of an experiment of {num_runs} runs: print the batch file again")
    return int(text)
