"""How near the planner's choice comes to the best plan found by hand: `python -m benchmarks.plan`.

For each model and budget the planner chooses micro-batch and schedules; the hand search tries every micro-batch of a
list with every schedule of the config, the same one in all stages, as a person would, keeps those whose measured peak
fits, and times them. All plans of a budget take turns; the ratio is of medians of processor time per image.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sret_scale.memory import MemoryConfig, apply_recomputation, apply_schedules, plan_for
from sret_scale.memory.planning.instrument import measure_peak
from sret_scale.memory.planning.micro_batch import BatchSearch
from sret_scale.memory.planning.rank_state import format_bytes, state_bytes
from sret_scale.memory.planning.step_cost import DEVICES
from sret_scale.model import Noise, SReT, SReTConfig, preset

MICRO_BATCHES = (1, 2, 4, 8)
LOOPS = {50: (5, 5, 5), 108: (12, 12, 8)}


def small_config(depth: int) -> SReTConfig:
    """SReT-T of this depth at 64 pixels."""
    config = preset("sret_t", image_size=64, num_classes=10, group_fit="nearest")
    stages = zip(config.stages, LOOPS[depth], strict=True)
    return replace(config, stages=tuple(replace(stage, num_loops=n, projections="per_loop") for stage, n in stages))


def plans_by_hand() -> Iterator[MemoryConfig]:
    """What a person would try."""
    yield from (MemoryConfig(schedule=name) for name in ("none", "per_application", "segments", "nested", "binomial"))
    yield from (MemoryConfig(schedule="segments", slots=slots) for slots in (4, 8, 16))
    yield from (MemoryConfig(schedule="binomial", slots=slots) for slots in (8, 16))


class Bench:
    """One model, whose step is measured under any plan."""

    def __init__(self, config: SReTConfig) -> None:
        torch.manual_seed(0)
        self.config = config
        self.model = SReT(config).train()

    def step(self, images_BCHW: Tensor) -> None:
        labels_B = torch.zeros(len(images_BCHW), dtype=torch.int64)
        F.cross_entropy(self.model(images_BCHW, Noise(0, 0)), labels_B).backward()

    def images(self, micro_batch_size: int) -> Tensor:
        """Made outside of what is measured: in training they are the data pipeline's."""
        return torch.randn(micro_batch_size, 3, self.config.image_size, self.config.image_size)

    def peak_bytes(self, micro_batch_size: int) -> int:
        images_BCHW = self.images(micro_batch_size)
        return measure_peak(self.model.parameters(), lambda: self.step(images_BCHW))

    def seconds_per_image(self, micro_batch_size: int) -> float:
        images_BCHW = self.images(micro_batch_size)
        began = time.process_time()
        self.step(images_BCHW)
        return (time.process_time() - began) / micro_batch_size


def compare(bench: Bench, batches: BatchSearch, activation_bytes: int, rounds: int) -> dict[str, Any]:
    """The planner's choice beside the best by hand within these activation bytes."""
    budget = activation_bytes + state_bytes(batches.any_costs, world_size=1, zero_stage=0).total
    rates = {size: batches.search(size).fastest(activation_bytes) for size in MICRO_BATCHES}
    fitting = {size: choice for size, choice in rates.items() if choice is not None}
    micro = max(fitting, key=lambda size: size / fitting[size].seconds)
    plan = plan_for(batches, budget_bytes=budget, micro_batch_size=micro, zero_stage=0)

    def use(name: str) -> int:
        if name == "planner":
            apply_schedules(bench.model, plan.schedules, MemoryConfig(), repeats_norms=True)
            return plan.micro_batch_size
        size, memory = by_hand[name]
        apply_recomputation(bench.model, memory, repeats_norms=memory.schedule != "none")
        return size

    by_hand: dict[str, tuple[int, MemoryConfig]] = {}
    for memory in plans_by_hand():
        apply_recomputation(bench.model, memory, repeats_norms=memory.schedule != "none")
        for size in MICRO_BATCHES:
            if bench.peak_bytes(size) > activation_bytes:
                break
            slots = f" {memory.slots}" if memory.slots else ""
            by_hand[f"{memory.schedule}{slots}, micro-batch {size}"] = (size, memory)
    times: dict[str, list[float]] = {name: [] for name in ("planner", *by_hand)}
    for _ in range(rounds):
        for name, values in times.items():
            values.append(bench.seconds_per_image(use(name)))
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(by_hand, key=lambda name: medians[name])
    return {
        "activation_bytes": activation_bytes,
        "planner": f"{', '.join(schedule.name for schedule in plan.schedules)}, micro-batch {plan.micro_batch_size}",
        "planner_peak_bytes": bench.peak_bytes(use("planner")),
        "best_by_hand": best,
        "plans_by_hand": len(by_hand),
        "planner_images_per_s": 1 / medians["planner"],
        "best_by_hand_images_per_s": 1 / medians[best],
        "ratio": medians[best] / medians["planner"],
    }


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depths", type=int, nargs="+", default=list(LOOPS), choices=LOOPS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plan.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for depth in args.depths:
        bench = Bench(small_config(depth))
        batches = BatchSearch(bench.config, "fp32", DEVICES["cpu"], repeats_norms=True)
        smallest = batches.search(1).smallest_bytes()
        for factor in (1.5, 4, 16):
            rows.append({"applications": depth, **compare(bench, batches, int(factor * smallest), args.rounds)})
            row = rows[-1]
            print(f"{depth} applications, {format_bytes(row['activation_bytes'])}: {row['ratio']:.3f}", flush=True)
    result = {
        "command": "python -m benchmarks.plan",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "torch": torch.__version__,
        "lowest_ratio": min(row["ratio"] for row in rows),
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
