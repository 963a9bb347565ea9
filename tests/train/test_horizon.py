"""`analyze horizon`: truncated gradients against plainly computed ones, what a step gains, bytes, and its words."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipelines.grids.made import GridOptions
from data_pipelines.stream.loader import evaluation_batches
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.cli import main
from sret_scale.config.recipes import recipe
from sret_scale.lab.analysis.horizon import STEP, HorizonPoint, horizon, in_words, stepped
from sret_scale.memory import MemoryConfig, predict_activations
from sret_scale.model import SReTConfig
from sret_scale.model.depth_plan import DepthPlan, StageDepth
from sret_scale.tasks import task_of
from sret_scale.train.evaluate_main import load_model_of, open_shards
from tests.hand_made import make_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mazes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on mazes of 7 pixels that never learned anything, of a model of six loops."""
    folder = tmp_path_factory.mktemp("mazes")
    made = GridOptions(puzzle="reach", count=10, smallest=7, largest=7)
    write_shards(WriteConfig(kind="mazes", source=made, seed=None), folder / "shards")
    config = recipe("reach").config
    assert isinstance(config.model, SReTConfig)
    stage = replace(config.model.stages[0], num_loops=6)
    shards = str(folder / "shards")
    config = replace(
        config,
        model=replace(config.model, stages=(stage,), image_size=7),
        depth=replace(config.depth, min_loops=2, max_loops=6, backprop_loops=2),
        data=replace(config.data, train_folder=shards, test_folder=shards),
        train=replace(config.train, global_batch_size=4, micro_batch_size=4),
    )
    return make_run(folder / "run", config)


def plain_gradient(run: Path, num_loops: int) -> dict[str, torch.Tensor]:
    """Of the first eight mazes: the state before the last loops is computed first, and is then a constant."""
    shards, config = open_shards(run, None)
    model, task = load_model_of(run, None, None)[0], task_of(config)
    batches = evaluation_batches(shards, config.data, image_size=7, batch_size=4, rank=0, world_size=1)
    losses = []
    for batch in list(batches)[:2]:
        inputs = task.inputs(batch, seed=0, device=CPU)
        plan = DepthPlan((StageDepth(tuple(range(6)), 6 - num_loops),))
        scores = model(inputs.model_input, None, [plan])[0]
        losses.append(task.loss(scores, inputs, progress=1.0, loops=6))
    torch.stack(losses).mean().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


@pytest.mark.lengthy
def test_points_are_what_plain_gradients_give(mazes: Path) -> None:
    points = horizon(mazes, 8)
    assert [point.loops for point in points] == [1, 2, 4, 6]
    whole = torch.cat([value.flatten() for value in plain_gradient(mazes, 6).values()])
    config = open_shards(mazes, None)[1].model
    for point in points:
        cut = torch.cat([value.flatten() for value in plain_gradient(mazes, point.loops).values()])
        assert point.cosines["all"] == pytest.approx(float(torch.cosine_similarity(cut, whole, dim=0)), abs=1e-4)
        plan = DepthPlan((StageDepth(tuple(range(6)), 6 - point.loops),))
        none = predict_activations(config, MemoryConfig(schedule="none"), micro_batch_size=4, depth=plan)
        assert point.none_bytes == none >= point.planned_bytes > 0
    assert points[-1].cosines["all"] == pytest.approx(1) and points[-1].gain > 0
    assert points[0].none_bytes < points[1].none_bytes < points[3].none_bytes
    assert {"all", "tied", "stem", "norm", "head"} <= set(points[0].cosines)


def test_a_step_is_as_long_as_it_says_and_is_taken_back(mazes: Path) -> None:
    model = load_model_of(mazes, None, None)[0]
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    size = torch.cat([weight.flatten() for weight in before.values()]).norm()
    with stepped(model, {name: torch.randn_like(weight) for name, weight in before.items()}):
        moved = torch.cat([(weight - before[name]).flatten() for name, weight in model.named_parameters()]).norm()
    assert float(moved.detach() / size) == pytest.approx(STEP, rel=1e-3)
    with stepped(model, {name: torch.zeros_like(weight) for name, weight in before.items()}):
        pass
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.lengthy
def test_the_command_draws_and_says_it(
    mazes: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A run of grids and one of classes, with stages of other depths.
    assert main(["analyze", "horizon", str(mazes), str(run), "--images", "8", "-o", str(tmp_path)]) == 0
    first, second, written = capsys.readouterr().out.splitlines()
    assert "this task needs k = " in first and " of 6 loops with gradient" in first and "planned" in first
    assert " of 3 loops with gradient" in second and "horizon_1.svg" in written
    with (tmp_path / "horizon_0.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["loops_with_gradient"] for row in rows] == ["1", "2", "4", "6"]
    assert float(rows[-1]["cosine_all"]) == pytest.approx(1)


def test_what_is_needed_is_where_all_further_ones_are_alike() -> None:
    def point(loops: int, likeness: float) -> HorizonPoint:
        return HorizonPoint(loops=loops, gain=1.0, cosines={"all": likeness}, none_bytes=loops, planned_bytes=1)

    likes = [(1, 0.95), (2, 0.3), (4, 0.92), (8, 1.0)]
    assert "needs k = 4 of 8" in in_words([point(*one) for one in likes])
    assert "needs k = 8 of 8" in in_words([point(1, 0.2), point(8, 1.0)])
    assert "needs k = 1 of 8" in in_words([point(1, 0.9), point(8, 1.0)])


def test_bad_input_is_said(mazes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "horizon", str(mazes), "--images", "0"]) == 2
    assert "--images: expected at least 1, got 0" in capsys.readouterr().err
    assert main(["analyze", "horizon", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


@pytest.mark.lengthy
def test_grids_are_evaluated_at_many_depths_and_other_sizes(
    mazes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = GridOptions(puzzle="reach", count=5, smallest=9, largest=11, seed=1)
    write_shards(WriteConfig(kind="mazes", source=made, seed=None), tmp_path / "larger")
    asked = ["evaluate", str(mazes), "--shards", str(tmp_path / "larger")]
    assert main([*asked, "--applications", "2,30"]) == 2
    assert "do not fit into 7 x 7 without resizing" in capsys.readouterr().err
    assert main([*asked, "--image-size", "11", "--applications", "2,30"]) == 0
    assert "exact match" in capsys.readouterr().out
    with (mazes / "depth_curve" / "evaluation_depth.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["applications"], row["read_out"]) for row in rows[2:]] == [("30", "last"), ("30", "mean")]
    assert rows[0]["split"] == f"{tmp_path / 'larger'} at 11 px" and 0 <= float(rows[0]["before_2_3"]) <= 1
    assert main(["evaluate", str(mazes), "--json"]) == 0
    assert '"exact"' in capsys.readouterr().out
    refused = ["--predictions", str(tmp_path / "x.csv")], ["--early-exit", "entropy"]
    for words in (*(["evaluate", str(mazes), *one] for one in refused), ["analyze", "loops", str(mazes)]):
        assert main(words) == 2
        assert f"{mazes} has task=grid, and this is asked of classes of images" in capsys.readouterr().err
