"""What telemetry costs: `python -m benchmarks.telemetry --out benchmarks/results/telemetry.json`.

A probed step (probe, kept weights, norms) and a plain training step (forward, backward with recomputation, AdamW) take
turns in one process; medians of processor time, which other processes on the machine do not spoil.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sret_scale.memory import MemoryConfig, apply_recomputation
from sret_scale.model import Noise, SReT, preset
from sret_scale.train.telemetry import Telemetry, TelemetryConfig

# Model, images of a step. The smallest step that anybody would train with makes the probe look largest. The first two
# take images of 28 pixels, the others of 224.
CASES = (("demo_control_20", 64), ("demo_student_108", 32), ("sret_t", 16), ("sret_t_108", 16))


def seconds(work: Callable[[], None]) -> float:
    """Processor time of one call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(name: str, num_images: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step and of a probe, and what the probe costs a step at its default interval."""
    torch.manual_seed(0)
    model = SReT(preset(name)).train()
    apply_recomputation(model, MemoryConfig())
    optimizer = torch.optim.AdamW(model.parameters())
    size = model.config.image_size
    images, labels = torch.randn(num_images, model.config.in_channels, size, size), torch.arange(num_images) % 10
    config = TelemetryConfig()
    telemetry = Telemetry(model, config, "fp32")

    def train() -> None:
        F.cross_entropy(model(images, Noise(1, 2)), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def probe() -> None:
        telemetry.look(images, lambda scores, part: F.cross_entropy(scores, labels[part]), Noise(1, 2))
        telemetry.before_update()
        telemetry.after_update()

    train()
    probe()
    steps, probes = zip(*((seconds(train), seconds(probe)) for _ in range(repeats)), strict=True)
    step_s, probe_s = statistics.median(steps), statistics.median(probes)
    return {
        "model": name,
        "image_size": size,
        "images": num_images,
        "probed_images": config.num_images,
        "step_s": round(step_s, 4),
        "probe_s": round(probe_s, 4),
        "interval_steps": config.interval_steps,
        "cost_ratio": round(probe_s / step_s / config.interval_steps, 6),
    }


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rows = [measure(name, count, args.repeats) for name, count in CASES]
    result = {
        "command": "python -m benchmarks.telemetry",
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread, no GPU",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "measured": "processor time, medians",
        "rows": rows,
    }
    for row in rows:
        print(f"{row['model']}: step {row['step_s']} s, probe {row['probe_s']} s, {row['cost_ratio']:.3%} of a step")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
