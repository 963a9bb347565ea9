"""The first run on own images, and the same run made longer."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sret_scale.cli import main
from sret_scale.config.run_config import from_yaml
from sret_scale.train.optim import learning_rate
from tests.forked import sret_scale_forked
from tests.runs import complete_lines
from tests.tiny import NUM_IMAGES, ROOT, tiny_config, tiny_shards, write_config

pytestmark = pytest.mark.multi_process


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def test_the_small_recipe_starts_without_a_refusal(shards: Path, tmp_path: Path) -> None:
    folders = [f"data.train_folder={shards / 'train'}", f"data.test_folder={shards / 'test'}"]
    dry = sret_scale_forked("train", "small", *folders, "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "train.total_images: 12,800 images = 100 epochs of 128" in dry.stdout and "num_classes: 10" in dry.stdout
    assert "optim.warmup_images: 640 images = 5 epochs of 128, 0.05 of the run" in dry.stdout
    small = ["model.image_size=64", "train.total_images=1ep", "data.workers=1"]
    ended = sret_scale_forked("train", "small", *folders, *small, "--ranks", "1", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    saved = from_yaml(tmp_path / "runs" / "small" / "config.yaml")
    assert (saved.train.total_images, saved.optim.warmup_images) == (NUM_IMAGES, 6)


def test_a_missing_tensorboard_is_found_before_the_ranks_start(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name))
    tiny = write_config(tmp_path / "tiny.yaml", tiny_config(shards), trackers=("tensorboard",))
    assert main(["train", str(tiny), "--dry-run"]) == main(["train", str(tiny)]) == 2
    shown = capsys.readouterr()
    assert "needs the tensorboard extra" in shown.err and not (tmp_path / "runs").exists()
    # The configuration of a refused dry run is printed all the same.
    assert "trackers:\n  - tensorboard" in shown.out
    for name, message in (("tensorbord", "expected tensorboard, wandb or module:function"), ("nowhere:f", "nowhere")):
        assert main(["train", str(tiny), f"train.trackers=[{name}]"]) == 2
        assert message in capsys.readouterr().err
    # A field of 0.1.0.
    assert main(["train", str(tiny), "train.trackers=[]", "train.tensorboard=false", "--dry-run"]) == 0
    assert main(["train", str(tiny), "train.tensorboard=true"]) == 2
    assert "set train.trackers=[tensorboard]" in capsys.readouterr().err


HAS_MLFLOW = importlib.util.find_spec("mlflow") is not None
MLFLOW_DOUBLE = """
import contextlib, json, pathlib

def set_experiment(name):
    print(name, file=open("calls", "a"))

@contextlib.contextmanager
def start_run(run_name):
    yield print(run_name, file=open("calls", "a"))

def log_metrics(metrics, step):
    print(json.dumps([metrics, step]), file=open("calls", "a"))
"""


@pytest.fixture
def own_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a command imports from its working folder is forgotten with it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("mlflow_tracker", "broken_tracker", *([] if HAS_MLFLOW else ["mlflow"])):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("own_modules")
def test_the_mlflow_tracker_of_the_page_logs_a_run(shards: Path, tmp_path: Path) -> None:
    """With a double of the three functions that it calls, where the package is not installed."""
    page = (ROOT / "docs" / "training.md").read_text()
    (tmp_path / "mlflow_tracker.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    if not HAS_MLFLOW:
        (tmp_path / "mlflow.py").write_text(MLFLOW_DOUBLE)
    broken = "def track(folder): return contextlib.nullcontext(lambda record: 1 / 0)"
    (tmp_path / "broken_tracker.py").write_text(f"import contextlib\n{broken}")
    tiny = write_config(tmp_path / "tiny.yaml", tiny_config(shards), total_images=128)
    trackers = "train.trackers=[mlflow_tracker:track,broken_tracker:track]"
    ended = sret_scale_forked("train", tiny, trackers, "--run", "runs/one", "--ranks", "1", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    logged = _of_mlflow(tmp_path) if HAS_MLFLOW else _of_double(tmp_path)
    lines = complete_lines(tmp_path / "runs" / "one" / "metrics.jsonl")
    assert logged == [(line["loss"], line["images"]) for line in lines if line["kind"] == "train"] and len(logged) == 4
    # What a tracker raises is told once and ends nothing.
    told = "tracker broken_tracker:track gets no more records: division by zero"
    assert ended.stdout.count(told) == 1


def _of_double(folder: Path) -> list[tuple[float, int]]:
    experiment, name, *calls = (folder / "calls").read_text().splitlines()
    assert (experiment, name) == ("runs", "one")
    return [(metrics["train/loss"], step) for metrics, step in map(json.loads, calls) if "train/loss" in metrics]


def _of_mlflow(folder: Path) -> list[tuple[float, int]]:
    mlflow = importlib.import_module("mlflow")
    # Its default: a database in the working folder.
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("runs").experiment_id])
    return [(metric.value, metric.step) for metric in client.get_metric_history(run.info.run_id, "train/loss")]


def test_a_dry_run_prints_the_configuration_that_it_refuses_to_build(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = write_config(tmp_path / "tiny.yaml", tiny_config(shards))
    for change, message in (
        ("optim.learning_rate=-1", "optim.learning_rate"),
        ("train.seed=many", "train.seed"),
        ("optim.lr=1e-3", "did you mean optim.learning_rate=0.001?"),
    ):
        assert main(["train", str(tiny), change, "--dry-run"]) == 2
        shown = capsys.readouterr()
        assert message in shown.err and shown.err.count("\n") == 1
        assert "total_images: 512" in shown.out
        # What has no place is left out.
        assert ("optim.lr" in change) or f"{change.partition('.')[2].replace('=', ': ')}" in shown.out
        assert main(["train", str(tiny), change]) == 2
        assert capsys.readouterr().out == ""
    tiny.write_text(tiny.read_text().replace("learning_rate: 0.", "learning_rate: -0."))
    assert main(["train", str(tiny), "--dry-run"]) == 2
    shown = capsys.readouterr()
    assert "learning_rate: -0." in shown.out and "learning_rate" in shown.err


def test_a_run_at_its_end_goes_on_with_the_schedule_of_the_new_length(shards: Path, tmp_path: Path) -> None:
    tiny = write_config(tmp_path / "tiny.yaml", tiny_config(shards), total_images=128)
    command = ("train", tiny, "--run", tmp_path / "run", "--ranks", "1")
    assert sret_scale_forked(*command, cwd=tmp_path).returncode == 0
    for options in (["--dry-run"], []):
        again = sret_scale_forked(*command, *options, cwd=tmp_path)
        assert again.returncode == 0 and "is finished" in again.stdout
        shorter = sret_scale_forked(*command, "train.total_images=96", *options, cwd=tmp_path)
        assert shorter.returncode == 2 and "has seen 128 images: expected train.total_images above" in shorter.stderr
        other = sret_scale_forked(*command, "optim.beta2=0.9", *options, cwd=tmp_path)
        assert other.returncode == 2 and "another configuration: optim.beta2: 0.999 -> 0.9" in other.stderr
    for options in (["--dry-run"], []):
        longer = sret_scale_forked(*command, "train.total_images=2ep", *options, cwd=tmp_path)
        assert longer.returncode == 0, longer.stderr
        assert "continues with train.total_images: 128 -> 256" in longer.stdout
        assert "at 128 images the learning rate goes from 1e-05 to 0.000752" in longer.stdout
    config = from_yaml(tmp_path / "run" / "config.yaml")
    assert config.train.total_images == 256
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rest = {line["images"]: line["lr"] for line in lines if line["kind"] == "train" and line["images"] > 128}
    assert rest == {images: learning_rate(config, images - 32) for images in (160, 192, 224, 256)}
    assert [line["images"] for line in lines if line["kind"] == "eval"][-1] == 256
