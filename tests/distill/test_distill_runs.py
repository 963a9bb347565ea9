"""Whole runs from the command line: a live teacher, its stored labels, and a store that does not belong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from data_pipelines.image.augment import AugmentConfig
from sret_scale.cli import main
from sret_scale.model import SReT, SReTConfig, preset
from sret_scale.model.vision.official import to_published
from sret_scale.model.vision.weight_files import save_model
from sret_scale.train.load_run import initial_state, load_model
from tests.forked import sret_scale_forked
from tests.tiny import ROOT, tiny_config, tiny_shards, write_config

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
    ended = sret_scale_forked("train", config, *overrides, "--run", run, "--ranks", "1", cwd=ROOT)
    assert ended.returncode == 0, ended
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def live(config: Path) -> list[float]:
    return losses(config, "live")


def test_run_with_stored_labels_has_the_losses_of_the_live_teacher(
    config: Path, store: Path, live: list[float]
) -> None:
    stored = losses(config, "stored", f"distill.teacher=labels:{store}")
    assert len(live) == 8 and stored == pytest.approx(live, abs=1e-3)


def test_store_of_other_views_stops_the_run_before_its_first_step(config: Path, store: Path) -> None:
    overrides = [f"distill.teacher=labels:{store}", "data.view_seed=8"]
    run = config.parent / "other"
    ended = sret_scale_forked("train", config, *overrides, "--run", run, "--ranks", "1", cwd=ROOT)
    assert ended.returncode == 2 and "data.view_seed=9" in ended.stdout + ended.stderr, ended
    assert "Traceback" not in ended.stdout + ended.stderr
    metrics = run / "metrics.jsonl"
    assert not metrics.exists() or '"train"' not in metrics.read_text()


def test_run_starts_from_the_weights_of_another_run(config: Path, live: list[float]) -> None:
    run = config.parent / "live"
    model = tiny_config(config.parent).model
    assert isinstance(model, SReTConfig)
    state = initial_state(f"run:{run}", model)
    assert torch.equal(state["head.weight"], load_model(run, "ema", print)[0].state_dict()["head.weight"])
    larger = initial_state(f"run:{run}", replace(model, image_size=48, drop_path=0.0))
    assert larger["position"].shape[-1] == 12 and torch.equal(larger["head.weight"], state["head.weight"])
    frozen = ["optim.learning_rate=1e-12", "optim.weight_decay=0.0", "optim.ema_horizon_images=0"]
    continued = losses(config, "continued", f"train.initial_weights=run:{run}", *frozen)
    assert max(continued) < live[0]
    weights = load_model(config.parent / "continued", "raw", print)[0].state_dict()
    torch.testing.assert_close(weights["head.weight"], state["head.weight"], atol=1e-6, rtol=0)
    torch.testing.assert_close(weights["position"], state["position"], atol=1e-6, rtol=0)


def test_weights_of_another_architecture_or_none_are_refused_before_the_start(config: Path, tmp_path: Path) -> None:
    model = tiny_config(config.parent).model
    other = replace(model, stages=(model.stages[0], replace(model.stages[1], mlp_ratio=2.0)))
    save_model(other.build(), tmp_path / "other.safetensors")
    arguments = ["train", str(config), "--run", str(tmp_path / "run"), "--ranks", "1"]
    for source, message in (
        (f"{tmp_path}/other.safetensors", "of another architecture: stages.1.mlp_ratio: 2.0 -> 4.0"),
        (f"{tmp_path}/none.safetensors", r"train\.initial_weights=.*: no file"),
        (f"run:{tmp_path}/none", "is not a run folder"),
        (f"{tmp_path}/other.pth", "no file"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            main([*arguments, f"train.initial_weights={source}", "--debug"])
    assert not (tmp_path / "run").exists()


def test_published_weights_are_interpolated_to_another_size(tmp_path: Path) -> None:
    small = replace(preset("sret_t_no_slice"), num_classes=10)
    small = replace(small, stages=tuple(replace(stage, num_blocks=1) for stage in small.stages))
    model = SReT(small)
    torch.save({"model": to_published(small, model.state_dict())}, tmp_path / "weights.pth")
    state = initial_state(f"{tmp_path}/weights.pth", replace(small, image_size=384))
    torch.testing.assert_close(state["position"], model.with_image_size(384).state_dict()["position"])
    assert torch.equal(state["head.weight"], model.state_dict()["head.weight"])
    deeper = replace(small, stages=tuple(replace(stage, num_blocks=2) for stage in small.stages))
    with pytest.raises(ValueError, match=r"weights\.pth: does not fit the model: the keys do not fit"):
        initial_state(f"{tmp_path}/weights.pth", deeper)
