"""What `evaluate` says beside one number: answers by sample and class, in any folder, of loops that nobody trained."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sret_scale.cli import main
from sret_scale.config.run_config import from_yaml, to_yaml
from sret_scale.model.vision.weight_files import load_model as load_native
from sret_scale.model.vision.weight_files import save_model
from sret_scale.runs.run_folder import RunFolder
from sret_scale.train.distributed import ranks_from_environment
from sret_scale.train.evaluate import evaluate
from sret_scale.train.evaluate_main import open_shards
from sret_scale.train.load_run import load_facts, load_model, load_trained
from tests.forked import sret_scale_forked
from tests.runs import complete_lines
from tests.train.conftest import CLASSES


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.lengthy
def test_answers_add_up_to_the_accuracy(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    details, predictions = tmp_path / "details", tmp_path / "predictions.csv"
    words = ["evaluate", str(run), "--details", str(details), "--predictions", str(predictions)]
    assert main([*words, "--json"]) == 0
    top1 = json.loads(capsys.readouterr().out)["top1"]
    rows = sorted(table(predictions), key=lambda row: row["key"])
    assert [row["key"] for row in rows] == [f"{name}/{index}" for name in CLASSES for index in range(8)]
    assert [row["class"] for row in rows] == [row["key"].partition("/")[0] for row in rows]
    right = [row["class"] == row["predicted"] for row in rows]
    assert np.mean(right) == pytest.approx(top1) and 0 < top1 < 1
    for row, is_right in zip(rows, right, strict=True):
        assert (row["probability"] == row["class_probability"]) == is_right
    # What `predict` says of the same pictures.
    assert main(["predict", str(run), str(photos), "--json", "--top", "1"]) == 0
    said = [answer["classes"][0] for answer in json.loads(capsys.readouterr().out)]
    assert [answer["class"] for answer in said] == [row["predicted"] for row in rows]
    probabilities = [float(row["probability"]) for row in rows]
    assert [answer["probability"] for answer in said] == pytest.approx(probabilities, abs=1e-4)
    by_class = {row["class"]: float(row["top1"]) for row in table(details / "classes.csv")}
    assert by_class == {
        name: pytest.approx(np.mean([a for a, row in zip(right, rows, strict=True) if row["class"] == name]), abs=1e-6)
        for name in CLASSES
    }
    confusion = {row["class"]: {name: int(row[name]) for name in CLASSES} for row in table(details / "confusion.csv")}
    assert confusion == {
        name: {other: sum(row["class"] == name and row["predicted"] == other for row in rows) for other in CLASSES}
        for name in CLASSES
    }
    assert (details / "confusion.png").stat().st_size > 1000
    with Image.open(details / "mistakes.png") as sheet:
        # A cell for each mistake, and two lines below it.
        assert sheet.width > 100 and len(sheet.getcolors(1 << 24) or ()) > 100
    assert main(words) == 0
    assert f"written: {details / 'classes.csv'}, " in capsys.readouterr().out


@pytest.mark.multi_process
def test_answers_of_several_ranks_are_those_of_one(run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run, tmp_path / "run")
    assert main(["evaluate", str(run), "--predictions", str(tmp_path / "one.csv")]) == 0
    ended = sret_scale_forked("evaluate", run, "--ranks", "2", "--predictions", tmp_path / "two.csv", cwd=tmp_path)
    assert ended.returncode == 0, ended
    one, two = table(tmp_path / "one.csv"), table(tmp_path / "two.csv")
    assert [(row["key"], row["predicted"]) for row in one] == [(row["key"], row["predicted"]) for row in two]


def test_early_exit_has_no_answers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--early-exit", "confidence", "--details", "x"]) == 2
    assert "without --early-exit" in capsys.readouterr().err


@pytest.mark.lengthy
def test_projections_that_nobody_trained_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--loops", "6"]) == 0
    # Three and two loops of a block become six and four, and each has a projection.
    assert "\n5 projections belong to loops that the run does not have: nobody trained them" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--loops", "3"]) == 0
    assert "nobody trained" not in capsys.readouterr().out


@pytest.mark.multi_process
def test_a_run_is_evaluated_and_moved_on_from_any_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shards were typed relative to the folder that it was started in."""
    project = tmp_path / "project"
    shutil.copytree(run.parent / "shards", project / "shards")
    config = from_yaml(run / "config.yaml")
    config = replace(config, data=replace(config.data, train_folder="shards", test_folder="shards"))
    config = replace(config, train=replace(config.train, total_images=8), optim=replace(config.optim, warmup_images=0))
    (project / "recipe.yaml").write_text(to_yaml(config))
    words = ["train", "recipe.yaml", "--run", "runs/one", "--ranks", "1"]
    ended = sret_scale_forked(*words, cwd=project)
    assert ended.returncode == 0, ended
    saved = from_yaml(project / "runs" / "one" / "config.yaml").data
    assert saved.train_folder == saved.test_folder == str(project / "shards")
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "project/runs/one"]) == 0
    # A run of version 0.1.0 has what was typed.
    (project / "runs" / "one" / "config.yaml").write_text(to_yaml(config))
    assert main(["evaluate", "project/runs/one"]) == 0
    # The whole project elsewhere, where the run goes on.
    moved = project.rename(tmp_path / "moved")
    (moved / "runs" / "one" / "config.yaml").write_text(to_yaml(replace(config, data=saved)))
    RunFolder(moved / "runs" / "one").write_status("stopped", 85)
    ended = sret_scale_forked(*words, cwd=moved)
    assert ended.returncode == 0 and f"continues with data.train_folder: '{project / 'shards'}'" in ended.stdout, ended


@pytest.mark.multi_process
def test_the_best_weights_by_evaluation_are_kept_and_exported_on_request(run: Path, tmp_path: Path) -> None:
    config = from_yaml(run / "config.yaml")
    steps = replace(config.train, total_images=48, eval_interval_images=8, checkpoint_interval_images=8)
    optim = replace(config.optim, warmup_images=0, learning_rate=0.002, ema_horizon_images=0)
    augment = replace(config.augment, mixup_alpha=0.0, cutmix_alpha=0.0)
    (tmp_path / "recipe.yaml").write_text(to_yaml(replace(config, train=steps, optim=optim, augment=augment)))
    ended = sret_scale_forked("train", "recipe.yaml", "--run", "run", "--ranks", "1", cwd=tmp_path)
    assert ended.returncode == 0, ended
    folder = tmp_path / "run"
    found = [line for line in complete_lines(folder / "metrics.jsonl") if line["kind"] == "eval"]
    best = max(found, key=lambda line: line["top1"])
    assert len(found) == 6 and best["top1"] > min(line["top1"] for line in found)
    model, kind, step = load_model(folder, "best", print)
    assert (kind, step) == ("best", best["step"])
    shards, _ = open_shards(folder, None)
    measured = evaluate(model, shards, config, ranks_from_environment())
    assert measured and (measured.numbers["top1"], measured.numbers["loss"]) == (best["top1"], best["loss"])
    assert load_facts(folder / "best.safetensors") == load_facts(folder)
    out = tmp_path / "best.safetensors"
    assert main(["export", str(folder), str(out), "--format", "safetensors", "--weights", "best"]) == 0
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in load_native(out).state_dict().items())
    # Another evaluation that is no better, after a restart, leaves it.
    before = (folder / "best.safetensors").stat().st_mtime_ns
    RunFolder(folder).write_status("stopped", 85)
    assert sret_scale_forked("train", "recipe.yaml", "--run", "run", "--ranks", "1", cwd=tmp_path).returncode == 0
    assert (folder / "best.safetensors").stat().st_mtime_ns == before


def test_best_weights_that_are_not_there_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--weights", "best"]) == 2
    assert "best.safetensors is not there: no evaluation of" in capsys.readouterr().err
    assert main(["predict", str(run / "checkpoints" / "step-000000002"), "a.png", "--weights", "best"]) == 2
    assert "the best weights are in the folder of its run" in capsys.readouterr().err


@pytest.mark.parametrize("step", [{}, {"step": "1"}, {"step": [1]}])
def test_best_weights_that_say_no_step_are_named(
    run: Path, tmp_path: Path, step: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    best = Path(shutil.copytree(run, tmp_path / "run")) / "best.safetensors"
    save_model(load_trained(run), best, step)
    assert main(["evaluate", str(best.parent), "--weights", "best"]) == 2
    assert f"{best}: step: " in capsys.readouterr().err
