"""What Slurm granted the job that this process belongs to: its nodes, and how many ranks and processors on each."""

import os
import re
import shutil
import socket
import subprocess

from sret_scale.launch.hostfile import Host, check_host_name


def is_reached_by_srun() -> bool:
    """True inside a job of several nodes, or of one that is not this machine: a login node where salloc was called."""
    if "SLURM_JOB_ID" not in os.environ:
        return False
    if (os.environ.get("SLURM_JOB_NUM_NODES") or os.environ.get("SLURM_NNODES", "1")) != "1":
        return True
    node, here = _node_list().partition(".")[0], socket.gethostname().partition(".")[0]
    # Slurm names the node to what it starts there; a container on it has another host name, and no srun.
    return "SLURMD_NODENAME" not in os.environ and node not in ("", here) and shutil.which("srun") is not None


def granted_hosts(num_ranks: int | None) -> tuple[Host, ...]:
    """The job's nodes, each with `num_ranks` ranks, or one a GPU, or where there are none, one a task.

    Raises OSError where Slurm does not answer.
    """
    names = scontrol("show", "hostnames", _node_list()).split()
    counts = [num_ranks] * len(names) if num_ranks else _gpus(names) or _tasks(len(names))
    return tuple(
        Host(name=check_host_name(name, "Slurm's node list"), devices=tuple(map(str, range(count))))
        for name, count in zip(names, counts, strict=True)
    )


def processors_per_node(num_nodes: int) -> int:
    """As many as the job has on each of its nodes."""
    return min(_per_node("SLURM_JOB_CPUS_PER_NODE", num_nodes), default=1)


def scontrol(*words: str) -> str:
    """What Slurm answers; OSError with a way out where the command is missing or fails."""
    reason = "there is no scontrol here"
    if shutil.which("scontrol"):
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout
        reason = f"scontrol {words[0]}: {done.stderr.strip() or f'status {done.returncode}'}"
    raise OSError(
        f"Slurm's job {os.environ.get('SLURM_JOB_ID')}: {reason}; give the command where Slurm's own commands work "
        "(a container may lack them), or give a --hostfile, or unset SLURM_JOB_ID to use this machine alone"
    )


def _node_list() -> str:
    return os.environ.get("SLURM_JOB_NODELIST") or os.environ.get("SLURM_NODELIST", "")


def _gpus(names: list[str]) -> list[int]:
    """The GPUs of each node; empty where the job has none."""
    counts = _per_node("SLURM_GPUS_PER_NODE", len(names))
    if not counts:
        # Nodes may differ, and only Slurm knows: SLURM_GPUS_ON_NODE is of one.
        of_node: dict[str, int] = {}
        details = scontrol("show", "job", "--details", os.environ["SLURM_JOB_ID"])
        for nodes, granted in re.findall(r"^\s+Nodes=(\S+) .*GRES=(\S*)", details, re.MULTILINE):
            count = sum(map(int, re.findall(r"\bgpu:(?:[^:,(]+:)?(\d+)", granted)))
            of_node |= dict.fromkeys(scontrol("show", "hostnames", nodes).split(), count)
        counts = [of_node.get(name, 0) for name in names]
    if not any(counts):
        counts = _per_node("SLURM_GPUS_ON_NODE", len(names))
    if any(counts) and not all(counts):
        raise ValueError(f"Slurm granted no GPU on {names[counts.index(0)]}, expected some on every node; ask for it")
    return counts if any(counts) else []


def _tasks(num_nodes: int) -> list[int]:
    variables = ("SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
    return next(filter(None, (_per_node(name, num_nodes) for name in variables)), [1] * num_nodes)


def _per_node(variable: str, num_nodes: int) -> list[int]:
    """The count of each node of `4` or `a100:2,v100:2` (all nodes alike) or `4(x2),2`; empty where it is none."""
    parts = re.findall(r"(?:^|,)((?:[A-Za-z][\w.-]*:)*)(\d+)(?:\(x(\d+)\))?", os.environ.get(variable, ""))
    counts = [int(count) for _, count, times in parts for _ in range(int(times or 1))]
    if any(kind for kind, _, _ in parts):
        counts = [sum(counts)]
    counts = counts * num_nodes if len(counts) == 1 else counts
    return counts if len(counts) == num_nodes else []
