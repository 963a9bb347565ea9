"""Weak scaling on paper: what the measured bytes of a step cost on 8 to 1024 GPUs; the tables of docs/scaling.md.

    python -m benchmarks.scaling

Formulas and where each number comes from are in docs/scaling.md; bytes per parameter are read from
benchmarks/results/engine.json, which was measured with two ranks.
"""

import json
from dataclasses import dataclass
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "engine.json"
GPUS = (8, 16, 64, 256, 1024)
GPUS_PER_NODE = 8
HOP_S = 10e-6
"""Latency of one step of a ring between nodes, NCCL's own work included (assumed; NVLink's is a third of it)."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """Bytes per second that a node of eight GPUs can send, all its adapters together."""

    name: str
    bytes_per_s: float


NETWORKS = (
    Network(name="8 x 400 Gb/s InfiniBand", bytes_per_s=0.8 * 8 * 50e9),
    Network(name="200 Gb/s InfiniBand", bytes_per_s=0.8 * 25e9),
    Network(name="25 Gb/s Ethernet", bytes_per_s=0.7 * 3.125e9),
)
NVLINK_BYTES_PER_S = 0.8 * 450e9


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model, and the seconds that one GPU computes for a step of its micro-batch."""

    name: str
    num_parameters: float
    step_s: float


JOBS = (
    Job(name="T, 20 applications, 256 images", num_parameters=4.8e6, step_s=256 / 15_000),
    Job(name="T, 1000 applications, 64 images", num_parameters=61.6e6, step_s=64 / 230),
    Job(name="S, 20 applications, 256 images", num_parameters=20.9e6, step_s=256 / 6_000),
)


def sent_bytes(bytes_at_two: float, num_parameters: float, num_gpus: int) -> float:
    """By one GPU in one step. All-reduce, reduce-scatter and all-gather in a ring all grow as (n - 1) / n."""
    return bytes_at_two * num_parameters * 2 * (num_gpus - 1) / num_gpus


def communication_s(volume_bytes: float, num_gpus: int, network: Network) -> float:
    """Of one step, without overlap: the slowest hop of the ring, and the latency of its hops, there and back.

    A ring leaves each node once, so what one GPU sends is what the adapters of its node have to carry; with several
    adapters there are several rings, each with its share.
    """
    is_one_node = num_gpus <= GPUS_PER_NODE
    speed = NVLINK_BYTES_PER_S if is_one_node else min(NVLINK_BYTES_PER_S, network.bytes_per_s)
    hop_s = HOP_S / 3 if is_one_node else HOP_S
    return volume_bytes / speed + 2 * (num_gpus - 1) * hop_s


def efficiency(job: Job, bytes_at_two: float, num_gpus: int, network: Network) -> float:
    """Speed per GPU relative to one GPU alone, nothing overlapped: the floor."""
    volume = sent_bytes(bytes_at_two, job.num_parameters, num_gpus)
    return job.step_s / (job.step_s + communication_s(volume, num_gpus, network))


def table(bytes_at_two: float) -> str:
    """Markdown: a row for each job and network, a column for each number of GPUs."""
    lines = ["| job | a node sends | " + " | ".join(map(str, GPUS)) + " |", "|---|---|" + "---|" * len(GPUS)]
    for job in JOBS:
        for network in NETWORKS:
            values = [f"{efficiency(job, bytes_at_two, count, network):.0%}" for count in GPUS]
            lines.append(f"| {job.name} | {network.name} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def main() -> None:
    steps = json.loads(RESULT.read_text())["steps"]
    for stage in ("zero1", "zero3"):
        measured = steps[stage]["sent_bytes_per_parameter"]
        print(f"ZeRO {stage[-1]}: {measured:.2f} bytes per parameter and step with two ranks\n\n{table(measured)}\n")


if __name__ == "__main__":
    main()
