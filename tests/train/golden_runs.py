"""Three small runs whose numbers no change may move by accident: their 20 losses and their last weights as text.

    python -m tests.train.golden_runs    records them anew in tests/golden/runs.json

A change that moves them on purpose records them anew in the same commit and says why there.
"""

import hashlib
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipelines.image.augment import AugmentConfig
from data_pipelines.stream.loader import DataConfig
from sret_scale.config.run_config import EngineConfig, OptimConfig, RunConfig, TrainConfig
from sret_scale.distill.config import DistillConfig
from sret_scale.memory import MemoryConfig
from sret_scale.model import SReTConfig, StageConfig
from sret_scale.train.load_run import load_model
from tests.forked import sret_scale_forked
from tests.runs import complete_lines
from tests.tiny import ROOT, tiny_shards, write_config

FILE = ROOT / "tests" / "golden" / "runs.json"
RANKS = {"plain": 1, "distilled": 1, "zero1": 2}
NUM_STEPS, GLOBAL_BATCH = 20, 16
TEACHER = "module:tests.train.golden_runs:teacher"


@dataclass(frozen=True)
class Golden:
    """What one run gave: the loss of every step, and SHA-256 of the weights that it ended with."""

    losses: list[float]
    weights: str


def config_of(name: str, shards: Path) -> RunConfig:
    """A model of two stages over all kinds of randomness; the names stand for what differs."""
    plain = RunConfig(
        model=SReTConfig(
            stages=(
                StageConfig(width=16, num_heads=2, num_blocks=1, num_loops=3, groups=(1,)),
                StageConfig(width=32, num_heads=2, num_blocks=1, num_loops=2, groups=(4, 2)),
            ),
            image_size=28,
            num_classes=10,
            stem_strides=(2, 2, 1),
            drop_path=0.1,
        ),
        data=DataConfig(
            train_folder=str(shards / "train"),
            test_folder=str(shards / "test"),
            crop="padded",
            crop_padding=2,
            eval_crop_rate=1.0,
            workers=1,
        ),
        augment=AugmentConfig(randaugment_ops=1, erase_rate=0.2),
        memory=MemoryConfig(schedule="per_application"),
        optim=OptimConfig(
            batch_scaling="none",
            # With 1e-8, parameters whose true gradient is 0 would follow the sign of rounding errors at full rate.
            eps=1e-4,
            warmup_images=64,
            ema_horizon_images=100,
            ema_statistics_images=64,
        ),
        engine=EngineConfig(ds_config="zero0"),
        train=TrainConfig(
            total_images=NUM_STEPS * GLOBAL_BATCH,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=8,
            log_interval_steps=1,
        ),
    )
    distilled = DistillConfig(teacher=TEACHER, hard_weight=0.2, temperature=2.0, temperature_end=1.0)
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "distilled": {"distill": distilled},
        "zero1": {"engine": EngineConfig(ds_config="zero1")},
    }
    return replace(plain, **changes[name])


def teacher() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    """A random network whose answers differ from image to image."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10)
    return nn.Sequential(*layers), (0.3,) * 3, (0.05,) * 3, 32


def train(name: str, folder: Path) -> Golden:
    """Train one of the runs in `folder`, which has the shards of `tiny_shards`."""
    file = write_config(folder / f"{name}.yaml", config_of(name, folder))
    ended = sret_scale_forked("train", file, "--run", folder / name, "--ranks", str(RANKS[name]), cwd=ROOT)
    assert ended.returncode == 0, ended
    steps = [line for line in complete_lines(folder / name / "metrics.jsonl") if line["kind"] == "train"]
    model, _, _ = load_model(folder / name, "raw", print)
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    return Golden([line["loss"] for line in steps], digest.hexdigest())


def machine() -> dict[str, str]:
    """All that decides on the bits of a sum: the library, its kernels and the instructions that it may choose from."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    known = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    vector = [flag for flag in known.get("flags", "").split() if flag.startswith(("avx", "amx", "fma", "f16c"))]
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": known.get("model name", platform.machine()),
        "instructions": " ".join(sorted(vector)),
    }


def recorded() -> Iterator[tuple[str, Golden]]:
    """The runs as they were recorded."""
    for name, run in json.loads(FILE.read_text())["runs"].items():
        yield name, Golden(**run)


def main() -> None:
    """Record the runs."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = tiny_shards(Path(temporary) / "shards")
        runs = {name: asdict(train(name, folder)) for name in RANKS}
    FILE.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
