"""What an experiment will cost, before it runs: parameters, MACs, bytes, and with a measured speed hours and money."""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch
import torch.nn.functional as F

from sret_scale.config.ds_config import load_ds_config, precision_of
from sret_scale.config.precision import autocast
from sret_scale.config.run_config import EngineConfig, ModelConfig, RunConfig, TrainConfig
from sret_scale.lab.experiments.declared import PlannedRun
from sret_scale.lab.experiments.matching import memory_of
from sret_scale.lab.readable_numbers import binary_size, compact, duration, grouped
from sret_scale.lab.report.depth_curves import FLOPS_PER_MAC_OF_TRAINING
from sret_scale.memory import MemoryConfig, apply_recomputation
from sret_scale.model import Noise

MEASURED_IMAGES = 8
MEASURED_PASSES = 6
"""The first one warms up; the fastest and the slowest of the others are told."""
BUSY_PERCENT = 20.0
"""Of all cores, in use by other processes: more makes what is measured here too slow for an idle machine."""
LARGEST_MEASURED = 20.0
"""The deeper of two measured models has at most so many times the MACs of the shallowest: a measurement is short."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds a training image costs on all ranks of a run together: `fixed_s`, and `per_mac_s` for each MAC."""

    fixed_s: float
    per_mac_s: float

    def run_s(self, run: PlannedRun) -> float:
        """Seconds that a run trains; evaluations and checkpoints come on top."""
        return run.config.train.total_images * (self.fixed_s + self.per_mac_s * run.macs)


def fit_speed(points: Sequence[tuple[float, float]]) -> Speed:
    """The line through (MACs, seconds an image), with no coefficient below 0; through the origin for one point."""
    macs, seconds = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    if len(set(macs)) > 1:
        # Relative errors count: a slow deep run must not decide what a shallow one is said to cost.
        weighted = np.stack([1 / seconds, macs / seconds], axis=1)
        fixed_s, per_mac_s = np.linalg.lstsq(weighted, np.ones(len(macs)), rcond=None)[0]
        if fixed_s >= 0 and per_mac_s >= 0:
            return Speed(fixed_s=float(fixed_s), per_mac_s=float(per_mac_s))
    return Speed(fixed_s=0.0, per_mac_s=float(np.exp(np.mean(np.log(seconds / macs)))))


def busy_warning() -> str:
    """A sentence where others compute on this machine; empty on an idle one. Takes half a second."""
    used = psutil.cpu_percent(interval=0.5)
    if used <= BUSY_PERCENT:
        return ""
    return f"warning: other processes use {used:.0f} % of this machine's cores: measured times are too long"


def measure_speeds(planned: Sequence[PlannedRun]) -> list[Speed]:
    """The fastest and the slowest speed of this process in a few steps of the shallowest model and of a deeper one."""
    by_macs = sorted(planned, key=lambda run: run.macs)
    shallow = by_macs[0]
    deep = [run for run in by_macs if run.macs <= LARGEST_MEASURED * shallow.macs][-1]
    chosen = {run.macs: seconds_an_image(run.config) for run in (shallow, deep)}
    return [fit_speed([(macs, choose(seconds)) for macs, seconds in chosen.items()]) for choose in (min, max)]


def seconds_an_image(config: RunConfig) -> list[float]:
    """Seconds an image of forward and backward passes; the model recomputes, but where a budget asks for a plan."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = min(MEASURED_IMAGES, config.train.micro_batch_size)
    model = config.model.build().to(device).train()
    memory = config.memory
    apply_recomputation(model, MemoryConfig() if memory.budget_bytes is not None else memory)
    images_BCHW = config.model.example(size).to(device)
    labels_B = torch.zeros(size, dtype=torch.int64, device=device)
    precision = precision_of(load_ds_config(config.engine.ds_config))
    taken_s = []
    for number in range(MEASURED_PASSES):
        started_s = time.perf_counter()
        with autocast(device.type, precision):
            scores_BC = model(images_BCHW, Noise(permutation_seed=number, sample_seed=number))
        F.cross_entropy(scores_BC.float(), labels_B).backward()  # type: ignore[no-untyped-call]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken_s.append((time.perf_counter() - started_s) / size)
    return taken_s[1:]


def sweep_table(
    planned: Sequence[PlannedRun],
    *,
    ranks_of_nodes: Sequence[int] = (1,),
    speeds: Sequence[Speed] = (),
    price_per_hour: float | None = None,
) -> str:
    """The runs and what each will cost, as a table for the terminal; the last line is the sum.

    `speeds` are the fastest and the slowest that is to be expected, or one, or none.
    `price_per_hour` is that of the machine or machines that one run takes. Predicting memory takes seconds a depth.
    """
    header = ["run", "applications", "parameters", "MACs", "samples", "training FLOPs", "memory"]
    header += ["time"] * bool(speeds) + ["cost"] * (bool(speeds) and price_per_hour is not None)
    rows = [header]
    total_s = [0.0 for _ in speeds]
    for run in planned:
        images = run.config.train.total_images
        row = [run.name, grouped(run.applications), compact(run.parameters), compact(run.macs), grouped(images)]
        row.append(compact(_flops(run)))
        config, ranks = run.config, sum(ranks_of_nodes)
        needed = _memory(config.model, config.memory, config.train.micro_batch_size, config.engine, ranks)
        row.append(binary_size(needed))
        run_s = [speed.run_s(run) for speed in speeds]
        total_s = [before + own for before, own in zip(total_s, run_s, strict=True)]
        row += _times(run_s, price_per_hour)
        rows.append(row)
    total = [f"{len(planned)} runs", "", "", "", grouped(sum(run.config.train.total_images for run in planned))]
    total += [compact(sum(_flops(run) for run in planned)), "", *_times(total_s, price_per_hour)]
    return _aligned([*rows, total])


def _times(seconds: Sequence[float], price_per_hour: float | None) -> list[str]:
    """The cells of time and cost, each from the least to the most; none where no speed is known."""
    cells = [list(map(duration, seconds))]
    cells += [] if price_per_hour is None else [[f"{price_per_hour * one / 3600:.2f}" for one in seconds]]
    return [" to ".join(dict.fromkeys(cell)) for cell in cells if cell]


def _flops(run: PlannedRun) -> int:
    return FLOPS_PER_MAC_OF_TRAINING * run.macs * run.config.train.total_images


@functools.cache
def _memory(model: ModelConfig, memory: MemoryConfig, micro_batch_size: int, engine: EngineConfig, ranks: int) -> int:
    """Bytes of a rank, once for all seeds and rates of a depth."""
    train = TrainConfig(micro_batch_size=micro_batch_size)
    return memory_of(RunConfig(model=model, memory=memory, train=train, engine=engine), ranks)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    return "\n".join(lines)
