"""`evaluate --applications`: one pass gives what single evaluations give, with intervals and signs of rest."""

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sret_scale.cli import main
from sret_scale.lab.depth_curve import flicker, loops_after, period
from sret_scale.model import SReTConfig, StageConfig
from sret_scale.model.read_out import ReadOut
from tests.forked import sret_scale_forked
from tests.runs import complete_lines
from tests.train.test_grid import batch


@pytest.mark.lengthy
def test_one_pass_gives_what_each_depth_gives_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(run, tmp_path / "run")
    # Three loops of one block, then one block: the head reads after 4, 5 and any more.
    assert main(["evaluate", str(run), "--applications", "4,5,9", "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert complete_lines(run / "metrics.jsonl")[-1] == {"kind": "depth", **line}
    assert [(one["applications"], one["read_out"]) for one in line["points"]] == [
        (count, kind) for count in (4, 5, 9) for kind in ("last", "mean")
    ]
    assert line["split"] == "test at 28 px" and line["num_samples"] == 24 and line["step"] == 2
    assert main(["evaluate", str(run), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    # A pass of more loops has smaller branches; that of five is the run's own only if nothing lies beyond.
    assert main(["evaluate", str(run), "--applications", "5", "--json"]) == 0
    (own, _) = json.loads(capsys.readouterr().out)["points"]
    assert {name: own[name] for name in ("top1", "top5")} == {name: alone[name] for name in ("top1", "top5")}
    assert own["loss"] == pytest.approx(alone["loss"])
    for point in line["points"]:
        assert point["top1_low"] <= point["top1"] <= point["top1_high"] and 0 <= point["flicker"] <= 1
        assert point["displacement"] is None or point["displacement"] > 0
    # Newest first: the curve of one depth is what the page and the files show.
    with (run / "depth_curve" / "evaluation_depth.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["applications"], row["read_out"]) for row in rows] == [("5", "last"), ("5", "mean")]
    assert float(rows[0]["top1"]) == own["top1"]
    assert main(["report", str(run), "-o", str(tmp_path / "page.html")]) == 0
    assert "Accuracy over the depth of evaluation" in (tmp_path / "page.html").read_text()
    assert (tmp_path / "page_files" / "evaluation_depth.svg").exists()


@pytest.mark.multi_process
def test_ranks_share_a_curve_and_find_the_same(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(run, tmp_path / "run")
    asked = ["evaluate", str(run), "--applications", "4,6", "--image-size", "32", "--json"]
    assert main(asked) == 0
    one = json.loads(capsys.readouterr().out)
    ended = sret_scale_forked(*asked, "--ranks", "2", cwd=tmp_path)
    assert ended.returncode == 0, ended
    two = json.loads(ended.stdout[ended.stdout.index("{\n") :])
    assert one["split"] == "test at 32 px"
    for ours, theirs in zip(one["points"], two["points"], strict=True):
        assert ours.pop("read_out") == theirs.pop("read_out")
        # What has no period, or no loop before it, is null.
        known = [{name: value for name, value in point.items() if value is not None} for point in (ours, theirs)]
        assert known[0] == pytest.approx(known[1], rel=1e-5)


def test_the_table_says_what_was_found(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(run, tmp_path / "run")
    assert main(["evaluate", str(run), "--applications", "5"]) == 0
    head, last, mean, written = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["applications", "read-out", "top-1"] and "flicker" in last
    assert last.split()[:2] == ["5", "last"] and mean.split()[:2] == ["5", "mean"]
    assert written.startswith(f"written: {run / 'depth_curve' / 'evaluation_depth.svg'}")


TOO_MANY = ",".join(map(str, range(1, 102)))


@pytest.mark.parametrize("text", ["0", "0,4", "5,4", "4,4", "four", "4,", "", "4.5", "99999999999", TOO_MANY])
def test_numbers_that_are_none_are_said(run: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), f"--applications={text}"]) == 2
    said = capsys.readouterr().err
    assert f"expected at most 100 ascending whole numbers of 1 to 65,536 such as 20,54,108, got {text[:200]!r}" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--applications", "3"], "gives scores after 4, 5, ... applications, got 3"),
        (["--applications", "5", "--loops", "4"], "--applications is another evaluation than --loops"),
        (["--applications", "5", "--details", "x"], "--applications is another evaluation than --details"),
        (["--image-size", "0"], "--image-size: expected 1 to 16,384 pixels, got 0"),
        (["--image-size", "24", "--early-exit", "entropy"], "--early-exit knows the run's own image size alone"),
        (["--image-size", "24"], "groups do not divide"),
    ],
)
def test_what_does_not_go_together_is_said(
    run: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_damaged_curve_leaves_the_page_whole(run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run, tmp_path / "run")
    clock = {"kind": "depth", "step": 1, "images": 8, "time_s": 1.0}
    points = [{"applications": 3, "read_out": "last", "top1": "much"}, {"applications": -3, "read_out": "last"}]
    curve = {"split": "a", "best": "top1", "best_in_words": "top-1"}
    with (run / "metrics.jsonl").open("a") as metrics:
        whole = {"applications": 3, "read_out": "last", "top1": 0.5, "top1_low": 0.4, "top1_high": 0.6}
        for name in ("applications", "top1", "top1_low"):
            points += [{**whole, name: value} for value in (10**400, -(10**400), math.nan, math.inf)]
        for line in ({}, {**curve, "points": 3}, {**curve, "points": points}, {**curve, "split": 1, "points": []}):
            metrics.write(json.dumps({**clock, **line}) + "\n")
    assert main(["report", str(run), "-o", str(tmp_path / "page.html")]) == 0
    assert "depth of evaluation" not in (tmp_path / "page.html").read_text()


def test_loops_behind_an_application() -> None:
    first, last = (
        StageConfig(width=8, num_heads=2, num_blocks=2, num_loops=3),
        StageConfig(width=8, num_heads=2, num_blocks=2, num_loops=4),
    )
    model = SReTConfig(stages=(first, last), image_size=16)
    # Six before, four of the first block, then one to four of the second.
    assert loops_after(model, [11, 14]) == [1, 4]
    for number in (10, 15):
        with pytest.raises(ValueError, match=r"after 11, 12, ..., 14 applications, got 1"):
            loops_after(model, [number])
    in_turn = replace(model, stages=(first, replace(last, loop_order="model")))
    assert loops_after(in_turn, [8, 14, 206]) == [1, 4, 100]
    with pytest.raises(ValueError, match=r"after 8, 10, ... applications, got 9"):
        loops_after(in_turn, [9])


def test_periods_are_found_where_scores_come_again() -> None:
    waves = np.stack([np.tile([0.0, 1.0, 5.0], 7), np.ones(21), np.arange(21), np.tile([2.0, 3.0], 11)[:21]])
    recent = [torch.tensor(waves[:, step, None] * np.ones(4)) for step in range(21)]
    assert period(recent).tolist() == [3, 1, 0, 2]
    assert period(recent[:1]).tolist() == [0, 0, 0, 0]


def test_flicker_counts_asked_tokens_that_changed() -> None:
    one = batch(1)
    answers = torch.zeros(3, 7, 7, dtype=torch.int64)
    answers[0, 0, :3] = 1  # three tokens were others before
    answers[1, 6, 6] = 2
    one.maps["map"][:] = 1
    one.maps["map"][0, 0, 0] = 255  # and of one of them nothing is asked
    recent = tuple(torch.nn.functional.one_hot(a, 3).movedim(-1, 0)[None].float() for a in answers)
    read = ReadOut(3, recent[-1], recent, torch.zeros(1))
    assert flicker(read, one).tolist() == pytest.approx([3 / 48])
    flat = tuple(torch.tensor([[0.0, 1.0], [float(step), 1.5]]) for step in range(3))
    assert flicker(ReadOut(3, flat[-1], flat, torch.zeros(2)), replace(batch(2), maps={})).tolist() == [0, 1]
