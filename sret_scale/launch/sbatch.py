"""The batch file for Slurm, and the requeue of a job that has saved: one launcher a job, one agent a node below it."""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sret_scale.launch.allocation import scontrol

# What a value of an #SBATCH line may hold: no blank, no quote, no line break, so that it stays one value.
_PLAIN = re.compile(r"[A-Za-z0-9/.%_][A-Za-z0-9_.,:@%/&|+=-]*")

_LINE = re.compile(r"-(-[a-z][a-z-]*(=\S[^\n\r\0]*)?|[a-zA-Z]( [^\n\r\0]+)?)")

# Minutes, minutes:seconds, hours:minutes:seconds, and days-hours with minutes and seconds or without.
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|(?i:unlimited|infinite)")


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """What Slurm is asked for, by the names of `sret-scale slurm`; an empty text leaves the choice to the cluster."""

    nodes: int
    gpus: int
    """A node, as are cpus and mem."""
    cpus: int
    time: str
    """Slurm's format, for example 1-00:00:00."""
    partition: str = ""
    account: str = ""
    name: str = "sret-scale"
    warning: int = 300
    """Seconds before the time limit at which the ranks save and the job requeues itself."""
    mem: str = ""
    output: str = ""
    exclusive: bool = False
    sbatch: Sequence[str] = ()
    """Options of sbatch as they are written, such as `--constraint=a100`."""
    setup: Path | None = None
    """Shell file that the job sources before the command."""


def batch_file(options: BatchOptions, arguments: Sequence[str]) -> str:
    """The text for sbatch that runs `sret-scale ARGUMENTS` in this folder; ValueError for a value that is not plain."""
    for name in ("nodes", "cpus"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(options, name)}")
    if options.warning < 0:
        raise ValueError(f"--warning: expected 0 or more seconds, got {options.warning}")
    lines = {
        "job-name": options.name,
        "nodes": str(options.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(options.cpus),
        "gpus-per-node": str(options.gpus) if options.gpus else "",
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "mem": options.mem,
        "output": options.output,
        # To the batch step alone: its launcher passes one request to stop on to all ranks.
        "signal": f"B:USR1@{options.warning}",
        "open-mode": "append",
    }
    for name, value in lines.items():
        if value and not _PLAIN.fullmatch(value):
            raise ValueError(
                f"--{name}: expected letters, digits and punctuation without blanks or quotes, got {value!r}"
            )
    if not _TIME.fullmatch(options.time):
        raise ValueError(f"--time: expected Slurm's format, such as 12:00:00 or 1-00:00:00, got {options.time!r}")
    for line in options.sbatch:
        if not _LINE.fullmatch(line):
            raise ValueError(f"--sbatch: expected one option of sbatch, such as --qos=long, got {line!r}")
    if options.setup and not options.setup.is_file():
        raise FileNotFoundError(f"--setup {options.setup}: there is no such file")
    setup = options.setup and shlex.quote(str(options.setup.absolute()))
    command = [sys.executable, "-P", "-m", "sret_scale.cli", *arguments]
    search_path = os.environ.get("PYTHONPATH")
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{name}={value}" for name, value in lines.items() if value),
            *(["#SBATCH --exclusive"] if options.exclusive else []),
            *(f"#SBATCH {line}" for line in options.sbatch),
            "#SBATCH --requeue",
            "",
            "# The same command continues the run: after a requeue, a preemption, or by sbatch once more.",
            f"cd -- {shlex.quote(str(Path.cwd()))} || exit 2",
            *([f". {setup} || exit 2"] if setup else []),
            *([f"export PYTHONPATH={shlex.quote(search_path)}"] if search_path else []),
            f"exec {shlex.join(command)}",
            "",
        ]
    )


def requeue_running_job(job_id: str) -> None:
    """Puts a batch job back into the queue unless Slurm is ending it for another reason.

    Called when the ranks have saved because of a signal: the warning before the time limit, or a preemption, during
    whose grace time the job would otherwise count as ended. A cancelled job is no longer RUNNING and stays cancelled.
    """
    try:
        shown = scontrol("show", "job", job_id)
        if "JobState=RUNNING" in shown and "BatchFlag=1" in shown:
            print(f"requeueing job {job_id}; it continues from its checkpoint", flush=True)
            scontrol("requeue", job_id)
    except OSError as error:
        # The run has saved, and that is its status.
        print(f"job {job_id} is not requeued: the same command continues the run. {error}", file=sys.stderr)
