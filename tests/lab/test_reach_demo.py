"""The demo of depth: the whole way on tiny mazes, what it says at its end, and that a second start repeats nothing."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

import sret_scale.lab.reach_demo as demo
from sret_scale.cli import main
from sret_scale.config.recipes import recipe
from sret_scale.config.run_config import RunConfig, from_yaml, grad_accum_steps
from sret_scale.launch.preflight import start_run
from sret_scale.model import describe
from tests.forked import use_forks


@pytest.mark.multi_process
def test_the_demo_goes_the_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def start(config: RunConfig, path: Path, *, num_ranks: int) -> int:
        train = replace(config.train, total_images=48, checkpoint_interval_images=0)
        tiny = replace(config, train=train, optim=replace(config.optim, warmup_images=16))
        with pytest.MonkeyPatch.context() as patch:
            use_forks(patch)
            return start_run(tiny, path, num_ranks=num_ranks)

    sides = {"train": (5, 7), "validation": (7, 7), "test": (9, 9)}
    mazes = {
        name: replace(demo.MAZES[name], count=24, smallest=low, largest=high) for name, (low, high) in sides.items()
    }
    small = {"MAZES": mazes, "TRAINED": 7, "TESTED": 9, "MOST_LOOPS": 12, "APPLICATIONS": [5, 8, 12], "FEW": 5}
    small |= {"MANY": 12, "SHOWN": [5, 12], "start_run": start}
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "reach"
    assert main(["demo", "reach", "--output", str(output)]) == 0
    *_, first, second, third = capfd.readouterr().out.splitlines()
    assert first.startswith("One block of 2,504 weights learned on mazes of at most 7 x 7 pixels")
    assert second.startswith("On mazes of 9 x 9, larger than any") and "applied 5 times, and " in second
    assert "applied 12 times." in second and third.startswith("Nothing else differs")
    with (output / "evaluation_depth.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["applications"] for row in rows[::2]] == ["5", "8", "12"]
    assert all(row["before_2_3"] and row["exact_low"] for row in rows)
    for name in ("strip.png", "strip.svg", "strip.csv", "evaluation_depth.png", "evaluation_depth_0.svg"):
        assert (output / name).stat().st_size > 100
    page = (output / "report.html").read_text()
    assert page.index("What one model believes of one maze") < page.index("Accuracy over the depth of evaluation")
    assert "Accuracy by path length: " in page and "path length 2 to 3" in page
    assert "Exact match ema" in page.replace("EMA", "ema") and "exact match, %" in page
    config = from_yaml(output / "model" / "config.yaml")
    assert config.task == "grid" and config.depth.max_loops == 12 and config.grid.ask_within == 0.5
    before = (output / "model" / "checkpoints").stat().st_mtime
    assert main(["demo", "reach", "--output", str(output)]) == 0
    assert (output / "model" / "checkpoints").stat().st_mtime == before


def test_the_recipe_is_the_model_of_the_sketch() -> None:
    config = recipe("reach").config
    assert describe(config.model)["parameters"] == 2_504
    for ranks in (1, 2, 4, 8, 16):
        assert grad_accum_steps(demo.reach_config(Path(), ranks).train, ranks) >= 1


def test_the_demo_of_mazes_takes_no_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "reach", "--source", "x"]) == 2
    assert "--source is of the demo on images" in capsys.readouterr().err
    assert main(["demo", "reach", "--output", "/proc/nothing"]) == 2
