"""Activation peak and step time over depth, beside torch's own checkpoint: `python -m benchmarks.memory`.

SReT-T widths with projections per loop, fp32, one thread. Peaks are read off `LiveBytes` (operators' storages without
gradients of parameters), above 108 applications with tensors that have no data; they do not depend on what else the
machine does, times do (without recomputation 1000 applications take 6 GiB there). So the parts can be measured one by
one, and each replaces its own rows: `--part peaks toy predictions times between`. Writes benchmarks/results/memory.json
and memory.png.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from benchmarks import memory_gpu
from sret_scale.memory import MemoryConfig, apply_recomputation, apply_schedules, prepare_memory
from sret_scale.memory.planning.instrument import LiveBytes
from sret_scale.memory.planning.predict import predict_chain
from sret_scale.memory.planning.probe import probe_step
from sret_scale.memory.planning.search import Search
from sret_scale.memory.planning.step_cost import DEVICES, step_peak_bytes
from sret_scale.memory.schedule import default_segments
from sret_scale.model import Application, Noise, SReT, SReTConfig, StageConfig, layers, preset
from sret_scale.model.operations import unfused as plain

RESULTS = Path(__file__).parent / "results"
LOOPS = {20: (2, 2, 2), 50: (5, 5, 5), 108: (12, 12, 8), 300: (30, 33, 25), 1000: (115, 130, 40)}
MAX_REAL = 108  # peaks of deeper models are read off tensors without data

PARTS = ("peaks", "toy", "predictions", "times", "between")
BUDGETS = 11

RunChain = Callable[[Sequence[Application], Tensor], Tensor]
Measure = Callable[["Bench", int, str], dict[str, Any]]


def deep_config(depth: int, image_size: int) -> SReTConfig:
    """SReT-T with this many applications."""
    config = preset("sret_t", image_size=image_size)
    stages = zip(config.stages, LOOPS[depth], strict=True)
    return replace(
        config, stages=tuple(replace(stage, num_loops=loops, projections="per_loop") for stage, loops in stages)
    )


def run_in_turn(applications: Sequence[Application], x_BND: Tensor) -> Tensor:
    for application in applications:
        x_BND = application(x_BND)
    return x_BND


def torch_segments(
    applications: Sequence[Application], x_BND: Tensor, *, length: int | None, is_nested: bool
) -> Tensor:
    """torch.utils.checkpoint around runs of `length` applications (None: sqrt(n)); nested: inside around each, too."""
    length = length or -(-len(applications) // default_segments(len(applications)))
    inner: RunChain = partial(torch_segments, length=1, is_nested=False) if is_nested else run_in_turn
    for lo in range(0, len(applications), length):
        x_BND = checkpoint(inner, applications[lo : lo + length], x_BND, use_reentrant=False)
    return x_BND


MEASURED = ("none", "per_application", "segments", "nested", "planned r=1", "planned r=2")
TWINS: dict[str, RunChain] = {
    "torch per application": partial(torch_segments, length=1, is_nested=False),
    "torch sqrt(n)": partial(torch_segments, length=None, is_nested=False),
    "torch nested sqrt(n)": partial(torch_segments, length=None, is_nested=True),
}


class Bench:
    """One model and one micro-batch.

    is_fake: tensors have no data. Every operator runs on storages of the right size, so peaks are the same to the byte.
    """

    def __init__(
        self, config: SReTConfig, micro_batch_size: int, precision: str = "fp32", *, is_fake: bool = False
    ) -> None:
        torch.manual_seed(0)
        self.precision = precision
        self.mode = FakeTensorMode(allow_non_fake_inputs=True) if is_fake else contextlib.nullcontext()
        with torch.device("meta") if is_fake else contextlib.nullcontext():
            self.model = SReT(config).train()
        with self.mode:
            if is_fake:
                self.model.to_empty(device="cpu")
            self.images = torch.randn(micro_batch_size, config.in_channels, config.image_size, config.image_size)
            self.labels = torch.zeros(micro_batch_size, dtype=torch.int64)
        self.planned = ""
        self.costs = probe_step(config, micro_batch_size=micro_batch_size, precision=precision, repeats_norms=True)

    def use(self, name: str) -> int | None:
        """Sets the model up under the schedule called `name`; returns the predicted peak, None for a twin."""
        if name in TWINS:
            apply_recomputation(self.model, MemoryConfig(schedule="none"))  # the stem as torch would store it
            for stage in self.model.stages:
                stage.run_chain = TWINS[name]  # type: ignore[assignment]
            return None
        if name.startswith("planned"):
            search = Search(self.costs, DEVICES["cpu"], max_passes=int(name[-1]))
            return self.plan(search, search.smallest_bytes(accuracy=0.0005))
        memory = MemoryConfig(schedule=name)
        # As a run does it at ZeRO 0 to 2.
        return prepare_memory(
            self.model,
            memory,
            micro_batch_size=len(self.images),
            precision=self.precision,
            world_size=1,
            zero_stage=0,
        ).activations

    def plan(self, search: Search, activation_bytes: int) -> int:
        """Sets the model up under the fastest plan within these bytes; returns the predicted peak."""
        choice = search.fastest(activation_bytes)
        assert choice is not None
        self.planned = ", ".join(schedule.name for schedule in choice.schedules)
        apply_schedules(self.model, choice.schedules, MemoryConfig(), repeats_norms=True)
        pairs = zip(choice.schedules, self.costs.stages, strict=True)
        return step_peak_bytes(self.costs, [predict_chain(*pair) for pair in pairs])

    def step(self) -> None:
        with self.mode, torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            loss = F.cross_entropy(self.model(self.images, Noise(0, 0)).float(), self.labels)
            loss.backward()

    def seconds(self) -> float:
        """Processor time of one step."""
        start = time.process_time()
        self.step()
        return time.process_time() - start

    def peak(self, name: str) -> dict[str, Any]:
        """Measured and predicted peak under one schedule."""
        predicted = self.use(name)
        return {"schedule": name, "peak_bytes": self.peak_bytes(), "predicted_bytes": predicted}

    def peak_bytes(self) -> int:
        """The measured peak of a step as the model is set up."""
        with self.mode, LiveBytes(self.model.parameters()) as counter:
            self.step()
        return counter.peak


def published_layers_peak(image_size: int, micro_batch_size: int) -> int:
    """Peak of 20 applications without recomputation, with layers that store what autograd stores by itself."""
    bench = Bench(deep_config(20, image_size), micro_batch_size)
    with patch.object(layers, "fused", plain):
        peak: int = bench.peak("none")["peak_bytes"]
    probe_step.cache_clear()  # costs of other layers
    return peak


def over_depth(
    depths: Sequence[int], size: tuple[int, int], measure: Measure, *, is_fake: bool = False
) -> Iterator[dict[str, Any]]:
    """One row per depth and schedule; `size` is of image and micro-batch."""
    image_size, micro_batch_size = size
    for depth in depths:
        bench = Bench(deep_config(depth, image_size), micro_batch_size, is_fake=is_fake and depth > MAX_REAL)
        for name in (*MEASURED, "torch per application", "torch sqrt(n)"):
            yield {"depth": depth, "schedule": name, **measure(bench, depth, name)}


def peak_at(bench: "Bench", depth: int, name: str) -> dict[str, Any]:
    return {**bench.peak(name), "is_fake": isinstance(bench.mode, FakeTensorMode)}


def time_at(bench: Bench, depth: int, name: str) -> dict[str, Any]:
    """Processor seconds of one step, the faster of two up to 108 applications."""
    bench.use(name)
    rounds = 1 if depth > MAX_REAL else 2
    return {"seconds": min(bench.seconds() for _ in range(rounds)), "rounds": rounds}


def predictions(image_size: int) -> Iterator[dict[str, Any]]:
    """Predicted against measured peaks of published and deep presets at real sizes, 30 combinations."""
    sizes = ((1, "fp32"), (3, "bf16"))
    for name, (micro_batch_size, precision) in itertools.product(("sret_t", "sret_t_108", "sret_s"), sizes):
        bench = Bench(preset(name, image_size=image_size), micro_batch_size, precision)
        for schedule in ("none", "per_application", "segments", "binomial", "planned r=2"):
            row = {"preset": name, "micro_batch": micro_batch_size, "precision": precision, **bench.peak(schedule)}
            yield {**row, "error": row["predicted_bytes"] / row["peak_bytes"] - 1}


def between(image_size: int, micro_batch_size: int) -> Iterator[dict[str, Any]]:
    """Plans for 108 applications within budgets from what `per_application` needs to what `none` needs, evenly spaced.

    All take turns; the time is the best of two.
    """
    bench = Bench(deep_config(108, image_size), micro_batch_size)
    search = Search(bench.costs, DEVICES["cpu"])
    low, high = (bench.use(name) or 0 for name in ("per_application", "none"))
    budgets = [low + (high - low) * step // (BUDGETS - 1) for step in range(BUDGETS)]
    seconds = {budget: float("inf") for budget in budgets}
    for _ in range(2):
        for budget in budgets:
            bench.plan(search, budget)
            seconds[budget] = min(seconds[budget], bench.seconds())
    for budget in budgets:
        predicted = bench.plan(search, budget)
        yield {
            "budget_bytes": budget,
            "predicted_bytes": predicted,
            "peak_bytes": bench.peak_bytes(),
            "planned": bench.planned,
            "modelled_images_per_s": micro_batch_size / _modelled_seconds(search, budget),
            "seconds": seconds[budget],
            "images_per_s": micro_batch_size / seconds[budget],
        }


def _modelled_seconds(search: Search, budget_bytes: int) -> float:
    choice = search.fastest(budget_bytes)
    assert choice is not None
    return choice.seconds


def overhead(image_size: int, micro_batch_size: int, rounds: int) -> dict[str, float]:
    """Step time of `nested` over nested torch checkpoints at 108 applications: taking turns, the best of the rounds."""
    bench = Bench(deep_config(108, image_size), micro_batch_size)
    best = {"nested": float("inf"), "torch nested sqrt(n)": float("inf")}
    for _ in range(rounds):
        for name in best:
            bench.use(name)
            best[name] = min(best[name], bench.seconds())
    return {**best, "ratio": best["nested"] / best["torch nested sqrt(n)"]}


def toy_10000() -> dict[str, Any]:
    """10,000 applications of a toy width at r = 2 against 20 applications without recomputation."""
    peaks: dict[int, int] = {}
    for loops, name in ((20, "none"), (10_000, "planned r=2")):
        stage = StageConfig(width=16, num_heads=1, num_blocks=1, num_loops=loops, projections="per_block")
        bench = Bench(SReTConfig(image_size=128, num_classes=10, stages=(stage,)), 1)
        peaks[loops] = bench.peak(name)["peak_bytes"]
    return {"peak_20": peaks[20], "peak_10000": peaks[10_000], "ratio": peaks[10_000] / peaks[20]}


def even_1000(image_size: int, micro_batch_size: int) -> Iterator[dict[str, Any]]:
    """1000 applications with the same loops in each stage: the model of 20 applications, 50 times as deep.

    The preset of 1000 has most of its loops where tokens are many.
    """
    stages = tuple(replace(stage, num_loops=100) for stage in deep_config(20, image_size).stages)
    bench = Bench(replace(deep_config(20, image_size), stages=stages), micro_batch_size, is_fake=True)
    yield from (bench.peak(f"planned r={r}") for r in (1, 2))


def summary(result: dict[str, Any]) -> dict[str, float]:
    """The promises of the memory room as ratios, as far as their parts are measured.

    `none` is this package's model without recomputation; `stored` the same with layers that store what autograd stores.
    """
    rows, even = result["rows"], result.get("even_1000", [])
    peak = {(row["depth"], row["schedule"]): row["peak_bytes"] for row in rows}
    pairs = [
        (row["predicted_bytes"], row["peak_bytes"])
        for row in (*rows, *even, *result.get("predictions", []), *result.get("between", []))
    ]
    found = {"worst_prediction_error": max(abs(ours / real - 1) for ours, real in pairs if ours)}
    for (depth, name), size_bytes in peak.items():
        if name == "planned r=1" and (depth, "torch sqrt(n)") in peak:
            found[f"r1_over_torch_sqrt_at_{depth}"] = size_bytes / peak[depth, "torch sqrt(n)"]
        if name.startswith("planned") and (20, "none") in peak:
            found[f"r{name[-1]}_at_{depth}_over_none_at_20"] = size_bytes / peak[20, "none"]
            found[f"r{name[-1]}_at_{depth}_over_stored_at_20"] = size_bytes / result["stored_peak_at_20"]
    for row in even if (20, "none") in peak else ():
        r = row["schedule"][-1]
        found[f"r{r}_at_even_1000_over_none_at_20"] = row["peak_bytes"] / peak[20, "none"]
        found[f"r{r}_at_even_1000_over_stored_at_20"] = row["peak_bytes"] / result["stored_peak_at_20"]
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Peak and time over depth, one line a schedule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, part, value, scale in zip(axes, ("rows", "times"), ("peak_bytes", "seconds"), (2**20, 1), strict=True):
        for name in dict.fromkeys(row["schedule"] for row in result.get(part, [])):
            mine = [row for row in result[part] if row["schedule"] == name]
            style = "--" if name in TWINS else "-"
            axis.loglog([r["depth"] for r in mine], [r[value] / scale for r in mine], style, marker="o", label=name)
    axes[0].set(xlabel="applications", ylabel="activation peak, MiB")
    axes[1].set(xlabel="applications", ylabel="processor time of a step, s")
    for axis in axes:
        axis.set_xticks(list(LOOPS), [str(depth) for depth in LOOPS])
        axis.minorticks_off()
    axes[0].set_yticks([20, 50, 100, 200, 500, 1000, 2000, 5000], ["20", "50", "100", "200", "500", "1k", "2k", "5k"])
    axes[1].set_yticks([0.2, 0.5, 1, 2, 5, 10, 20], ["0.2", "0.5", "1", "2", "5", "10", "20"])
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=list(LOOPS), choices=LOOPS)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the overhead measurement")
    parser.add_argument("--part", nargs="+", default=PARTS, choices=PARTS, help="what to measure (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json", help="where other parts are kept")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: the table of `memory_gpu`")
    args = parser.parse_args()
    if args.device == "cuda":
        memory_gpu.run(args.out.with_name("memory_gpu.json"))
        return
    torch.set_num_threads(1)
    size = (args.image_size, args.micro_batch)
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    result |= {
        "command": "python -m benchmarks.memory",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "torch": torch.__version__,
        "image_size": args.image_size,
        "micro_batch": args.micro_batch,
    }
    parts: dict[str, Iterator[dict[str, Any]]] = {}
    if "peaks" in args.part:
        result["stored_peak_at_20"] = published_layers_peak(*size)
        parts = {"rows": over_depth(args.depths, size, peak_at, is_fake=True), "even_1000": even_1000(*size)}
    if "toy" in args.part:
        result["toy_10000"] = toy_10000()
    if "predictions" in args.part:
        parts["predictions"] = predictions(args.image_size)
    if "between" in args.part:
        parts["between"] = between(*size)
    if "times" in args.part:
        result["overhead_at_108"] = overhead(*size, args.rounds)
        parts["times"] = over_depth(args.depths, size, time_at)
    for part, rows in parts.items():
        # Other depths keep what was measured for them.
        result[part] = [row for row in result.get(part, []) if row.get("depth", args.depths[0]) not in args.depths]
        for row in rows:
            result[part].append(row)
            result[part].sort(key=lambda row: row.get("depth", 0))
            print(json.dumps(row), flush=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")  # what is measured is kept if the rest is cut off
    if "rows" in result:
        result["summary"] = summary(result)
    print(json.dumps({key: result.get(key) for key in ("summary", "overhead_at_108", "toy_10000")}, indent=2))
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
