"""Planned recomputation on a GPU: `python -m benchmarks.memory --device cuda`, in under 8 minutes.

For T and S widths at 108 and 1000 applications and for each budget: the planner's choice of micro-batch and schedules,
half and twice its micro-batch planned within the same budget, and the choice with its boundaries in host memory. Whole
steps in bf16 autocast with AdamW; predicted beside measured activation bytes. Cells come in order of interest until the
time is up, and what was left out is listed with its reason. Nothing but the reading of the peak is of a GPU alone.
"""

import gc
import json
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sret_scale.memory import MemoryConfig, Plan, apply_schedules, plan_for
from sret_scale.memory.planning.instrument import measure_peak
from sret_scale.memory.planning.micro_batch import BatchSearch
from sret_scale.memory.planning.rank_state import format_bytes
from sret_scale.memory.planning.step_cost import DEVICES
from sret_scale.model import Noise, SReT, SReTConfig, preset

PRESETS = ("sret_t_108", "sret_s_108", "sret_t_1000", "sret_s_1000")
BUDGETS = (10 * 2**30, 40 * 2**30, 80 * 2**30)
TIME_LIMIT_S = 440.0
ROUND_S = 1.0
OUTSIDE_BYTES = 2**30
"""The device's context and kernels, which no allocator counts; a whole budget above what a device has is cut to it."""


class Cell:
    """One model on the device, whose training step is measured under any plan."""

    def __init__(self, config: SReTConfig, device: torch.device) -> None:
        torch.manual_seed(0)
        self.config, self.device = config, device
        self.model = SReT(config).train().to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def measure(self, plan: Plan, *, is_offloaded: bool) -> dict[str, Any]:
        """Images per second, and the activation bytes of a step whose state is there already."""
        apply_schedules(self.model, plan.schedules, MemoryConfig(is_offloaded=is_offloaded), repeats_norms=True)
        size = self.config.image_size
        images = torch.randn(plan.micro_batch_size, self.config.in_channels, size, size, device=self.device)
        labels = torch.zeros(plan.micro_batch_size, dtype=torch.int64, device=self.device)

        def backward() -> None:
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = F.cross_entropy(self.model(images, Noise(0, 0)).float(), labels)
            loss.backward()

        backward()  # makes gradients and, below, the optimiser's state
        self.optimizer.step()
        peak_bytes = self._peak_bytes(backward)
        steps, began = 0, time.perf_counter()
        while steps < 2 or time.perf_counter() - began < ROUND_S:
            backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=False)
            self._synchronise()
            steps += 1
        seconds = (time.perf_counter() - began) / steps
        return {"activation_bytes": peak_bytes, "images_per_s": plan.micro_batch_size / seconds, "steps": steps}

    def _peak_bytes(self, backward: Any) -> int:
        if self.device.type != "cuda":
            return measure_peak(self.model.parameters(), backward)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        backward()
        return torch.cuda.max_memory_allocated(self.device) - before

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def rows(
    configs: dict[str, SReTConfig], budgets: Sequence[int], device: torch.device, time_limit_s: float
) -> Iterator[dict[str, Any]]:
    """A row for each model, budget and choice; where one could not be measured it says why."""
    began = time.perf_counter()
    kind = "gpu" if device.type == "cuda" else "cpu"
    for name, config in configs.items():
        batches = BatchSearch(config, "bf16", DEVICES[kind], repeats_norms=True)
        cell = Cell(config, device)
        for budget in budgets:
            chosen = plan_for(batches, budget_bytes=budget, zero_stage=0, reserved_bytes=OUTSIDE_BYTES)
            size = chosen.micro_batch_size
            choices = [("planner", size, False), ("planner, offloaded", size, True)]
            choices += [("half the batch", size // 2, False)] * (size > 1) + [("twice the batch", 2 * size, False)]
            for label, micro, is_offloaded in choices:
                row = {"preset": name, "budget_bytes": budget, "choice": label, "micro_batch": micro}
                if time.perf_counter() - began > time_limit_s:
                    yield {**row, "left_out": "time is up"}
                    continue
                try:
                    plan = plan_for(
                        batches,
                        budget_bytes=budget,
                        micro_batch_size=micro,
                        zero_stage=0,
                        reserved_bytes=OUTSIDE_BYTES,
                    )
                except ValueError as error:
                    yield {**row, "left_out": str(error)}
                    continue
                row |= {"schedules": [s.name for s in plan.schedules], "predicted_bytes": plan.activations}
                try:
                    measured = cell.measure(plan, is_offloaded=is_offloaded)
                except torch.cuda.OutOfMemoryError:
                    yield {**row, "left_out": "out of memory"}
                    continue
                finally:
                    cell.optimizer.zero_grad(set_to_none=False)
                    gc.collect()
                error_ratio = plan.activations / measured["activation_bytes"] - 1
                yield {**row, **measured, "prediction_error": error_ratio}
        del cell
        gc.collect()


def run(out: Path) -> None:
    """Measures on the first GPU, prints the rows and writes them."""
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU is here; leave the option out to measure on the CPU")
    device = torch.device("cuda", 0)
    properties = torch.cuda.get_device_properties(device)
    budgets = list(dict.fromkeys(min(budget, properties.total_memory) for budget in BUDGETS))
    result: dict[str, Any] = {
        "command": "python -m benchmarks.memory --device cuda",
        "machine": f"{properties.name}, {format_bytes(properties.total_memory)}, {platform.machine()}",
        "torch": torch.__version__,
        "precision": "bf16 autocast",
        "rows": [],
    }
    for row in rows({name: preset(name) for name in PRESETS}, budgets, device, TIME_LIMIT_S):
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
