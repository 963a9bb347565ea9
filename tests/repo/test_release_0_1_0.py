"""What release 0.1.0 wrote is read by the code of today (`tests/golden/release_0_1_0`)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sret_scale.cli import main
from sret_scale.config.removed_fields import REMOVED_FIELDS
from sret_scale.config.run_config import from_yaml, override, to_yaml
from sret_scale.train.load_run import load_facts
from tests.forked import sret_scale_forked
from tests.runs import complete_lines
from tests.tiny import ROOT

RELEASE = ROOT / "tests" / "golden" / "release_0_1_0"
ONE_STEP = ("train.total_images=4", "optim.warmup_images=0")
LOSSES = [0.6982523202896118, 0.7027459144592285, 0.688406765460968, 0.7131326794624329]
"""Of its last four steps as they are repeated now: mixing draws its pairs' shares otherwise since whole batches are
augmented. (It had 0.6856, 0.7014, 0.6862, 0.7291.)"""
TOLERANCE = 1e-5
"""Relative, as the machine may be another one."""


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to write into, and the working folder, which the paths in its configuration are relative to."""
    monkeypatch.chdir(shutil.copytree(RELEASE, tmp_path / "release"))
    return Path.cwd()


def train(release: Path, run: str, *overrides: str) -> list[dict[str, Any]]:
    """The lines about steps in the log of a run that ended well."""
    arguments = ["run/config.yaml", *overrides, "--run", run, "--ranks", "1"]
    ended = sret_scale_forked("train", *arguments, cwd=release)
    assert ended.returncode == 0, ended
    return [line for line in complete_lines(release / run / "metrics.jsonl") if line["kind"] == "train"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_its_shards_verify(release: Path, split: str) -> None:
    assert main(["shards", "verify", f"shards/{split}", "--workers", "1"]) == 0


@pytest.mark.multi_process
def test_a_run_trains_from_its_shards(release: Path) -> None:
    assert len(train(release, "new", *ONE_STEP)) == 1


@pytest.mark.multi_process
def test_its_run_continues_from_its_checkpoint(release: Path) -> None:
    lines = complete_lines(release / "run" / "metrics.jsonl")
    (release / "run" / "status.json").unlink()
    shutil.rmtree(release / "run" / "checkpoints" / "step-000000008")
    before = [line for line in lines if line["kind"] == "train"]
    *old, fifth, sixth, seventh, eighth = train(release, "run")
    assert old == before
    again = [line["loss"] for line in (fifth, sixth, seventh, eighth)]
    assert again == pytest.approx(LOSSES, rel=TOLERANCE)
    assert [line["step"] for line in (fifth, eighth)] == [5, 8]
    # What is saved today answers without the run's folder.
    assert load_facts(release / "run" / "checkpoints" / "step-000000008") == load_facts(release / "run")


def test_its_run_evaluates_to_what_it_logged(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged = [line for line in complete_lines(release / "run" / "metrics.jsonl") if line["kind"] == "eval"]
    assert {line["weights"] for line in logged} == {"raw", "ema"}
    for line in logged:
        assert main(["evaluate", "run", "--weights", line["weights"], "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["top1"] == line["top1"] and found["loss"] == pytest.approx(line["loss"], rel=TOLERANCE)


def test_its_run_is_reported_and_exported(release: Path) -> None:
    # Its log has lines of energy, which later versions do not write.
    assert any(line["kind"] == "energy" for line in complete_lines(release / "run" / "metrics.jsonl"))
    assert main(["report", "run", "-o", "report.html"]) == 0
    assert "0.1.0" in Path("report.html").read_text()
    assert main(["weights", "export", "run", "weights.pth"]) == 0
    published = torch.load("weights.pth", weights_only=True)
    assert {name: published[name] for name in set(published) - {"model"}} == load_facts(release / "run")


@pytest.mark.multi_process
@pytest.mark.parametrize("teacher", ["labels:labels", "run:run"])
def test_its_labels_and_its_run_teach(release: Path, teacher: str) -> None:
    distill = (f"distill.teacher={teacher}", "distill.teacher_input=view")
    assert len(train(release, "student", *ONE_STEP, *distill)) == 1


def test_its_labels_verify(release: Path) -> None:
    assert main(["labels", "verify", "labels", "shards/train"]) == 0


def test_a_removed_field_is_passed_over_at_its_old_default_and_else_named_with_what_to_use(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REMOVED_FIELDS, "train.warp_speed", (1.5, "set train.seed instead"))
    file = release / "run" / "config.yaml"
    config = from_yaml(file)
    saved = to_yaml(config)
    file.write_text(saved.replace("train:\n", "train:\n  warp_speed: 1.5\n"))
    assert from_yaml(file) == config == override(config, ["train.warp_speed=1.5"])
    file.write_text(saved.replace("train:\n", "train:\n  warp_speed: 9\n"))
    with pytest.raises(ValueError, match=r"config\.yaml: train\.warp_speed=9 is no longer a field: set train\.seed"):
        from_yaml(file)
    with pytest.raises(ValueError, match=r"^train\.warp_speed=9 is no longer a field: set train\.seed instead$"):
        override(config, ["train.warp_speed=9"])
