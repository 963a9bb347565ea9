"""Starts a run on as many hosts of a hostfile as there are, and goes on with those that are left when one is lost.

The global batch, and with it every sample of every step, stays what the configuration says: fewer ranks accumulate
more. What changes with the number of ranks is only what docs/reliability.md says of another world size.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sret_scale.config.run_config import RunConfig, TrainConfig
from sret_scale.launch.hostfile import Host
from sret_scale.launch.nodes import choose_nodes
from sret_scale.launch.preflight import start_run
from sret_scale.runs.run_folder import EXIT_FAILED
from sret_scale.train.watchdog import EXIT_HANG


@dataclass(frozen=True, kw_only=True)
class Elastic:
    """How many hosts a run may have: at least `minimum`, at most `maximum`."""

    minimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.maximum:
            raise ValueError(f"--elastic: expected 1 <= MIN <= MAX, got {self.minimum}:{self.maximum}")

    @classmethod
    def parse(cls, text: str) -> "Elastic":
        """Of `MIN:MAX`; ValueError for anything else."""
        match = re.fullmatch(r"([0-9]{1,5}):([0-9]{1,5})", text)
        if match is None:
            raise ValueError(f"--elastic: expected MIN:MAX hosts, for example 2:8, got {text!r}")
        return cls(minimum=int(match[1]), maximum=int(match[2]))


def fit_hosts(hosts: Sequence[Host], train: TrainConfig, elastic: Elastic) -> tuple[tuple[Host, ...], TrainConfig]:
    """The longest beginning of `hosts` whose ranks share the global batch equally, and the batch they compute it in.

    The micro-batch becomes the largest divisor of a rank's share that is not above the configured one.
    Raises ValueError where no allowed number of hosts divides the global batch.
    """
    most = min(len(hosts), elastic.maximum)
    for count in range(most, elastic.minimum - 1, -1):
        num_ranks = _num_ranks(hosts[:count])
        share, remainder = divmod(train.global_batch_size, num_ranks)
        if share and not remainder:
            micro = max(size for size in range(1, min(share, train.micro_batch_size) + 1) if share % size == 0)
            return tuple(hosts[:count]), replace(train, micro_batch_size=micro)
    if most < elastic.minimum:
        raise ValueError(
            f"--elastic: expected at least {elastic.minimum} hosts, {most} can be reached: {_names(hosts)}"
        )
    ranks = [_num_ranks(hosts[:count]) for count in range(elastic.minimum, most + 1)]
    divisors = [size for size in range(1, max(ranks) + 1) if train.global_batch_size % size == 0]
    raise ValueError(
        f"--elastic: train.global_batch_size={train.global_batch_size} cannot be shared equally by {ranks} ranks "
        f"(the allowed numbers of hosts); numbers of ranks that divide it: {divisors}"
    )


def _num_ranks(hosts: Sequence[Host]) -> int:
    return sum(len(host.devices) for host in hosts)


def start_elastic(
    config: RunConfig,
    path: Path,
    hosts: Sequence[Host],
    elastic: Elastic,
    *,
    is_fresh: bool = False,
    dry_run: bool = False,
) -> int:
    """`start_run` on the hosts that can be reached; again on the rest when one is lost. Returns the exit status.

    A lost host stays left out until the command is given again, so this ends. A failure with all hosts in reach is the
    run's own and ends it too. Raises what `start_run` raises, and ValueError when too few hosts are left.
    """
    if not hosts:
        raise ValueError("--elastic needs a --hostfile; inside Slurm a job that loses a node is requeued")
    remaining = list(hosts) if dry_run else _without_lost(hosts, path)
    while True:
        used, train = fit_hosts(remaining, config.train, elastic)
        batch = f"micro-batch {train.micro_batch_size} of a global batch of {train.global_batch_size}"
        print(f"elastic: {len(used)} of {len(hosts)} hosts ({_names(used)}), {batch}", flush=True)
        status = start_run(replace(config, train=train), path, hosts=used, is_fresh=is_fresh, dry_run=dry_run)
        if status not in (EXIT_FAILED, EXIT_HANG):
            return status
        left = _without_lost(remaining, path)
        if left == remaining:
            return status
        remaining, is_fresh = left, False


def _without_lost(hosts: Sequence[Host], path: Path) -> list[Host]:
    """The hosts that can take part, in order; says on stderr what is wrong with each of the others."""
    existing = next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())
    problems = choose_nodes(hosts=hosts).problems(existing) if hosts else {}
    for problem in problems.values():
        print(f"elastic: left out: {problem}", file=sys.stderr, flush=True)
    return [host for host in hosts if host.name not in problems]


def _names(hosts: Sequence[Host]) -> str:
    return ", ".join(host.name for host in hosts) or "none"
