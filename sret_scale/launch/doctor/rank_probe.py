"""What every rank measures for `sret-scale doctor`: its clock, a matrix product, and the all-reduce with all others.

Started like a run, by the launcher, so that ssh, the shared folder, ports and the network are those of a run.
"""

import socket
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data_pipelines.shards.index import open_shards
from sret_scale.launch.doctor.checks import Finding, check_machine
from sret_scale.launch.doctor.inputs import check_shards, check_teacher
from sret_scale.launch.doctor.measured import Probe
from sret_scale.train.distributed import Ranks, barrier, from_all_ranks, sum_over_ranks


def matmul_rate(device: torch.device) -> float:
    """Operations a second: bf16 with 4096 rows on a GPU, fp32 with 512 on a CPU."""
    is_gpu = device.type == "cuda"
    size = 4096 if is_gpu else 512
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if is_gpu else torch.float32)
    best_s = float("inf")
    for _ in range(10):
        began_s = _now(device)
        matrix @ matrix
        best_s = min(best_s, _now(device) - began_s)
    return 2 * size**3 / best_s


def all_reduce_rate(ranks: Ranks) -> float:
    """Bytes a second, the best of five; on a GPU of the gradients of a 20-million-parameter model."""
    values = torch.ones(20_000_000 if ranks.device.type == "cuda" else 1_000_000, device=ranks.device)
    best_s = float("inf")
    for _ in range(5):
        barrier()
        began_s = _now(ranks.device)
        sum_over_ranks(values)
        best_s = min(best_s, _now(ranks.device) - began_s)
    return values.numel() * values.element_size() / best_s


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def check_node(request: Mapping[str, Any]) -> tuple[Finding, ...]:
    """The checks of this machine, and of what a run on it would read."""
    findings = [*check_machine(Path(request["folder"])), *check_shards([Path(path) for path in request["shards"]])]
    if request["teacher"] and all(finding.state != "fail" for finding in findings):
        shards = open_shards(Path(request["shards"][0]), allow_remote=True)
        findings.append(check_teacher(request["teacher"], shards.class_names))
    return tuple(findings)


def probe_rank(request: dict[str, Any], ranks: Ranks) -> list[dict[str, Any]]:
    """Every rank's Probe, in order; request: folder, shards and teacher to check on each node."""
    bandwidth = all_reduce_rate(ranks) if ranks.world_size > 1 else 0.0
    barrier()
    clock_s = time.time()
    probe = Probe(
        rank=ranks.rank,
        host=socket.gethostname(),
        torch=torch.__version__,
        device=torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu",
        clock_s=clock_s,
        matmul_per_s=matmul_rate(ranks.device),
        all_reduce_bytes_per_s=bandwidth,
        findings=check_node(request) if ranks.local_rank == 0 else (),
    )
    return from_all_ranks(asdict(probe))
