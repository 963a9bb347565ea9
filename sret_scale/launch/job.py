"""What a node is told: one line of JSON on the agent's stdin, so that no value ever passes through a shell."""

import base64
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from data_pipelines.checked_files import parse_checked


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job of one or more nodes; the same on all of them but for `node_rank`."""

    run_folder: str
    working_folder: str
    module: str
    arguments: tuple[str, ...]
    world: Mapping[str, tuple[str, ...]]
    """Host name -> its devices, in rank order."""
    master_addr: str
    master_port: int
    node_rank: int | None = None
    """This node's place in `world`; None inside Slurm, where the agent finds it by the node's name."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Set for the ranks, over what the node has."""
    stop_grace_s: float = 120.0
    """How long ranks may take to save and end after they are asked to stop."""
    failure_grace_s: float = 10.0
    """How long the other ranks may live after one failed."""

    @property
    def world_size(self) -> int:
        """Ranks on all nodes together."""
        return sum(len(devices) for devices in self.world.values())

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Job":
        """The job of a line that `to_line` wrote."""
        return parse_checked(line.encode(), cls, "the job on stdin")


def deepspeed_command(job: Job, node_rank: int) -> list[str]:
    """The command of DeepSpeed's per-node launcher, which starts the ranks of that node.

    The `deepspeed` runner in front of it is left out: killed, it leaves the nodes running and reports success, and it
    builds shell lines from its arguments.
    """
    world = base64.urlsafe_b64encode(json.dumps(job.world).encode()).decode()
    return [
        *(sys.executable, "-u", "-P", "-m", "deepspeed.launcher.launch"),
        f"--world_info={world}",
        f"--node_rank={node_rank}",
        f"--master_addr={job.master_addr}",
        f"--master_port={job.master_port}",
        "--log_level=critical",
        "--no_local_rank",
        # Its own way to start Python would let files of the working folder come before the libraries' modules.
        "--no_python",
        *(sys.executable, "-u", "-P", "-m", "sret_scale.launch.rank_bootstrap"),
        *(job.run_folder, job.module, *job.arguments),
    ]
