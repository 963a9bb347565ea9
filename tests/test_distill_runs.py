"""Whole runs from the command line: a live teacher, its stored labels, and a store that does not belong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from data_pipelines.augment import AugmentConfig
from sret_scale.cli import main
from tests.tiny import ROOT, sret_scale, tiny_config, tiny_shards, write_config

pytestmark = pytest.mark.multi_process
TEACHER = f"module:{__name__}:ten_classes"


def ten_classes() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    """A random teacher whose answers differ from image to image."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10)), *STATISTICS, 32


STATISTICS = (0.3,) * 3, (0.05,) * 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny = tiny_config(tiny_shards(folder))
    mixup = AugmentConfig(randaugment_ops=0, erase_rate=0.0, cutmix_alpha=0.0)
    data = replace(tiny.data, num_views=2, view_seed=9)
    distill = replace(tiny.distill, teacher=TEACHER, teacher_input="view")
    return write_config(
        folder / "tiny.yaml", replace(tiny, data=data, augment=mixup, distill=distill), total_images=256
    )


@pytest.fixture(scope="module")
def store(config: Path) -> Path:
    folder = config.parent / "store"
    numbers = ["--views", "2", "--top-k", "10", "--batch-size", "32", "--recipe", str(config)]
    assert main(["labels", "write", str(config.parent / "train"), str(folder), "--teacher", TEACHER, *numbers]) == 0
    return folder


def losses(config: Path, name: str, *overrides: str) -> list[float]:
    run = config.parent / name
    process = sret_scale("train", config, *overrides, "--run", run, "--ranks", "1", cwd=ROOT)
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, out + error
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_run_with_stored_labels_has_the_losses_of_the_live_teacher(config: Path, store: Path) -> None:
    live = losses(config, "live")
    stored = losses(config, "stored", f"distill.teacher=labels:{store}")
    assert len(live) == 8 and stored == pytest.approx(live, abs=1e-3)


def test_store_of_other_views_stops_the_run_before_its_first_step(config: Path, store: Path) -> None:
    overrides = [f"distill.teacher=labels:{store}", "data.view_seed=8"]
    run = config.parent / "other"
    process = sret_scale("train", config, *overrides, "--run", run, "--ranks", "1", cwd=ROOT)
    out, error = process.communicate(timeout=240)
    assert process.returncode == 2 and "data.view_seed=9" in out + error, out + error
    assert "Traceback" not in out + error
    metrics = run / "metrics.jsonl"
    assert not metrics.exists() or '"train"' not in metrics.read_text()
