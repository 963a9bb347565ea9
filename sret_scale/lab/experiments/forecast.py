"""What an experiment will cost, before it runs: parameters, MACs, bytes, and with a measured speed hours and money."""

import csv
import functools
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data_pipelines.checked_files import open_regular
from sret_scale.config.ds_config import load_ds_config, precision_of
from sret_scale.config.precision import autocast
from sret_scale.config.run_config import RunConfig
from sret_scale.lab.experiments.declared import PlannedRun
from sret_scale.lab.experiments.matching import memory_of
from sret_scale.lab.readable_numbers import binary_size, compact, duration, grouped
from sret_scale.lab.report.depth_curves import FLOPS_PER_MAC_OF_TRAINING
from sret_scale.memory import MemoryConfig, apply_recomputation
from sret_scale.model import Noise, SReT, SReTConfig

MEASURED_IMAGES = 8
MEASURED_PASSES = 3
"""The fastest of so many counts: the first one warms up."""
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


def read_speed(file: Path) -> Speed:
    """The speed from a CSV with the columns `macs` and `images_per_s`, such as a report's summary.csv.

    Raises ValueError naming what is missing, FileNotFoundError.
    """
    with open_regular(file) as raw, io.TextIOWrapper(raw, encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in ("macs", "images_per_s") if name not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{file} has no column {missing[0]!r}: expected a CSV with macs and images_per_s")
        points = []
        for row in reader:
            try:
                macs, images_per_s = float(row["macs"]), float(row["images_per_s"] or "nan")
            except (TypeError, ValueError) as error:
                raise ValueError(f"{file} line {reader.line_num}: {error}") from error
            if macs > 0 and 0 < images_per_s < math.inf:
                points.append((macs, 1 / images_per_s))
    if not points:
        raise ValueError(f"{file} has no row with macs and images_per_s above 0: nothing was measured")
    return fit_speed(points)


def measure_speed(planned: Sequence[PlannedRun]) -> Speed:
    """The speed of this process, from a few training steps of the shallowest model and of one some times deeper."""
    by_macs = sorted(planned, key=lambda run: run.macs)
    shallow = by_macs[0]
    deep = [run for run in by_macs if run.macs <= LARGEST_MEASURED * shallow.macs][-1]
    chosen = {run.macs: run.config for run in (shallow, deep)}
    return fit_speed([(macs, _seconds_an_image(config)) for macs, config in chosen.items()])


def _seconds_an_image(config: RunConfig) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = min(MEASURED_IMAGES, config.train.micro_batch_size)
    return step_s(config, device, size) / size


def step_s(config: RunConfig, device: torch.device, micro_batch_size: int) -> float:
    """Seconds of a forward and backward pass of the model, with its recomputation where no budget asks for a plan."""
    model = SReT(config.model).to(device).train()
    memory = config.memory
    apply_recomputation(model, MemoryConfig() if memory.budget_bytes is not None else memory)
    shape = (micro_batch_size, config.model.in_channels, config.model.image_size, config.model.image_size)
    images_BCHW = torch.zeros(shape, device=device)
    labels_B = torch.zeros(micro_batch_size, dtype=torch.int64, device=device)
    precision = precision_of(load_ds_config(config.engine.ds_config))

    def step(number: int) -> None:
        with autocast(device.type, precision):
            scores_BC = model(images_BCHW, Noise(permutation_seed=number, sample_seed=number))
        F.cross_entropy(scores_BC.float(), labels_B).backward()  # type: ignore[no-untyped-call]

    return _fastest_s(step, device)


def _fastest_s(work: Callable[[int], object], device: torch.device) -> float:
    taken_s = []
    for number in range(MEASURED_PASSES):
        started_s = time.perf_counter()
        work(number)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken_s.append(time.perf_counter() - started_s)
    return min(taken_s)


def sweep_table(
    planned: Sequence[PlannedRun],
    *,
    ranks_of_nodes: Sequence[int] = (1,),
    speed: Speed | None = None,
    price_per_hour: float | None = None,
) -> str:
    """The runs and what each will cost, as a table for the terminal; the last line is the sum.

    `price_per_hour` is that of the machine or machines that one run takes. Predicting memory takes seconds a depth.
    """
    header = ["run", "applications", "parameters", "MACs", "images", "training FLOPs", "memory"]
    header += ["time"] * (speed is not None) + ["cost"] * (speed is not None and price_per_hour is not None)
    rows = [header]
    total_s = 0.0
    for run in planned:
        images = run.config.train.total_images
        row = [run.name, grouped(run.applications), compact(run.parameters), compact(run.macs), grouped(images)]
        row.append(compact(_flops(run)))
        row.append(binary_size(_memory(run.config.model, _MemoryKey.of(run.config, sum(ranks_of_nodes)))))
        if speed is not None:
            run_s = speed.run_s(run)
            total_s += run_s
            row += [duration(run_s), *([] if price_per_hour is None else [f"{price_per_hour * run_s / 3600:.2f}"])]
        rows.append(row)
    total = [f"{len(planned)} runs", "", "", "", grouped(sum(run.config.train.total_images for run in planned))]
    total += [compact(sum(_flops(run) for run in planned)), ""]
    if speed is not None:
        total += [duration(total_s), *([] if price_per_hour is None else [f"{price_per_hour * total_s / 3600:.2f}"])]
    return _aligned([*rows, total])


def _flops(run: PlannedRun) -> int:
    return FLOPS_PER_MAC_OF_TRAINING * run.macs * run.config.train.total_images


@dataclass(frozen=True, kw_only=True)
class _MemoryKey:
    """What a rank's bytes depend on besides the model."""

    memory: MemoryConfig
    micro_batch_size: int
    ds_config: str
    world_size: int

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> "_MemoryKey":
        return cls(
            memory=config.memory,
            micro_batch_size=config.train.micro_batch_size,
            ds_config=config.engine.ds_config,
            world_size=world_size,
        )


@functools.cache
def _memory(model: SReTConfig, key: _MemoryKey) -> int:
    """Bytes of a rank, once for all seeds and rates of a depth."""
    base = RunConfig(model=model, memory=key.memory)
    train = {**vars(base.train), "micro_batch_size": key.micro_batch_size}
    engine = {**vars(base.engine), "ds_config": key.ds_config}
    config = RunConfig(
        model=model, memory=key.memory, train=type(base.train)(**train), engine=type(base.engine)(**engine)
    )
    return memory_of(config, key.world_size)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    return "\n".join(lines)
