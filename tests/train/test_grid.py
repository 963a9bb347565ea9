"""Grids as a task: symmetries by sample, a loss that waits for the front, counts against a slow twin, bad inputs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.grids.mazes import UNREACHED
from data_pipelines.stream.loader import Batch
from sret_scale.config.run_config import GridConfig, RunConfig, from_yaml, override, to_yaml
from sret_scale.config.step_depth import DepthConfig, depth_plans
from sret_scale.distill.config import DistillConfig
from sret_scale.model import preset
from sret_scale.tasks import task_of
from sret_scale.tasks.grid import Grid, symmetric
from sret_scale.train.assemble import Clock
from sret_scale.train.step import Moment, micro_batch_loss, plans_of
from tests.reference.grid import slow_loss, slow_numbers

CPU = torch.device("cpu")
SIDE, CLASSES = 7, 3


def config(**grid: Any) -> RunConfig:
    model = replace(preset("reach"), image_size=SIDE, num_classes=CLASSES)
    return RunConfig(task="grid", model=model, grid=GridConfig(**grid))


def batch(count: int = 4, *, seed: int = 0) -> Batch:
    """Drawn images, labels of which a fifth is not asked for, distances of which a tenth is none."""
    draw = torch.Generator().manual_seed(seed)

    def whole(high: int, share: float, else_: int) -> torch.Tensor:
        values = torch.randint(high, (count, SIDE, SIDE), generator=draw)
        return values.masked_fill(torch.rand(values.shape, generator=draw) < share, else_)

    return Batch(
        images=torch.randint(256, (count, 3, SIDE, SIDE), generator=draw).to(torch.uint8),
        labels=torch.zeros(count, dtype=torch.int64),
        indices=torch.arange(10, 10 + count),
        valid=torch.ones(count, dtype=torch.bool),
        views=torch.zeros(count, 5, dtype=torch.int32),
        view_numbers=torch.arange(count, dtype=torch.int32) % 2,
        maps={"map": whole(CLASSES, 0.2, 255).to(torch.uint8), "distance": whole(40, 0.1, UNREACHED).to(torch.int32)},
    )


def rows(one: Batch, chosen: list[int]) -> Batch:
    names = ("images", "labels", "indices", "valid", "views", "view_numbers")
    maps = {name: values[chosen] for name, values in one.maps.items()}
    return Batch(**{name: getattr(one, name)[chosen] for name in names}, maps=maps)


def test_a_sample_is_turned_alike_in_every_batch_and_its_maps_with_it() -> None:
    task, one = Grid(config(ask_within=1.0)), batch(64)
    whole = task.inputs(one, seed=1, device=CPU)
    for chosen in ([0, 1, 2], [63, 5]):
        part = task.inputs(rows(one, chosen), seed=2, device=CPU)
        assert torch.equal(part.model_input, whole.model_input[chosen])
        assert torch.equal(part.target, whole.target[chosen])
    plain = task.evaluation_input(one, CPU)
    drawn = []
    for row in range(64):
        target = torch.stack([one.maps["map"][row].long(), one.maps["distance"][row].long()])
        fits = [n for n in range(8) if torch.equal(symmetric(plain[row], n), whole.model_input[row])]
        assert len(fits) == 1 and torch.equal(symmetric(target, fits[0]), whole.target[row])
        drawn.append(fits[0])
    assert set(drawn) == set(range(8))
    again = task.inputs(replace(one, view_numbers=one.view_numbers + 2), seed=1, device=CPU)
    assert not torch.equal(again.model_input, whole.model_input), "another epoch, another symmetry"


def test_the_eight_symmetries_are_eight_and_keep_squares() -> None:
    square = torch.arange(9).view(3, 3)
    found = {tuple(symmetric(square, number).flatten().tolist()) for number in range(8)}
    turned = [torch.rot90(flipped, turns) for flipped in (square, square.T) for turns in range(4)]
    assert found == {tuple(one.flatten().tolist()) for one in turned} and len(found) == 8


@pytest.mark.parametrize(("ask_within", "loops"), [(None, 1), (0.5, 1), (0.5, 21), (0.5, 200), (2.0, 3)])
def test_loss_asks_only_what_can_be_known(ask_within: float | None, loops: int) -> None:
    task, one = Grid(config(ask_within=ask_within)), batch()
    inputs = task.inputs(one, seed=0, device=CPU)
    assert inputs.target[:, 1].any() == (ask_within is not None)
    scores = torch.randn(4, CLASSES, SIDE, SIDE)
    most = float("inf") if ask_within is None else ask_within * loops
    for part in (slice(None), slice(1, 3)):
        found = task.loss(scores[part], inputs, progress=0.5, loops=loops, part=part)
        label, attribute = inputs.target[part].unbind(1)
        assert float(found) == pytest.approx(slow_loss(scores[part], label, attribute, most=most), rel=1e-5)


def test_smoothed_labels_give_every_class_a_part() -> None:
    one, smoothed = batch(), replace(config(), distill=DistillConfig(label_smoothing=0.3))
    plain, task = Grid(config()), Grid(smoothed)
    inputs, scores = plain.inputs(one, seed=0, device=CPU), torch.randn(4, CLASSES, SIDE, SIDE)
    found = task.loss(scores, inputs, progress=0.5, loops=1)
    # 0.7 of the loss of the label and 0.1 of that of each of the three classes.
    label, _ = inputs.target.unbind(1)
    nats = -scores.log_softmax(dim=1).mean(dim=1)[label != 255].mean()
    expected = 0.7 * plain.loss(scores, inputs, progress=0.5, loops=1) + 0.3 * nats
    torch.testing.assert_close(found, expected)


def test_nothing_that_is_asked_costs_nothing() -> None:
    one = batch()
    one = replace(one, maps={"map": torch.full_like(one.maps["map"], 255)})
    task = Grid(config())
    scores = torch.randn(4, CLASSES, SIDE, SIDE, requires_grad=True)
    loss = task.loss(scores, task.inputs(one, seed=0, device=CPU), progress=0.0, loops=1)
    loss.backward()
    assert loss.item() == 0 and scores.grad is not None and not scores.grad.any()
    assert task.numbers(task.counts(scores.detach(), one).sum(0).tolist()) == {"exact": 1, "balanced": 0, "loss": 0}


def test_counts_are_those_of_the_slow_twin_and_add_up() -> None:
    task, one = Grid(config(bins="distance")), batch(12)
    label, attribute = one.maps["map"], one.maps["distance"]
    scores = 2.0 * torch.nn.functional.one_hot(label.long().clamp(max=2), CLASSES).movedim(-1, 1)
    scores = scores + torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    scores[3] = torch.nn.functional.one_hot(label[3].long().clamp(max=2), CLASSES).movedim(-1, 0)
    found = task.numbers(task.counts(scores, one).sum(0).tolist())
    assert found == pytest.approx(slow_numbers(scores, label, attribute)) and found["exact"] == 1 / 12
    assert [name for name in found if "distance" in name][:3] == ["distance_0_1", "distance_2_3", "distance_4_7"]
    parts = [task.counts(scores[part], rows(one, list(range(12))[part])) for part in (slice(5), slice(5, 12))]
    assert torch.equal(torch.cat(parts), task.counts(scores, one))
    # Rows that only fill a batch up count nothing, whatever stands in them.
    padded = replace(one, valid=torch.arange(12) < 5)
    broken = scores.clone()
    broken[5:] = float("nan")
    assert torch.equal(task.counts(broken, padded)[:5], parts[0]) and not task.counts(broken, padded)[5:].any()


def test_a_step_tells_the_loss_how_many_loops_are_done() -> None:
    depth = DepthConfig(loops="log_uniform", min_loops=4, max_loops=9, backprop_loops=4, supervise_every=2)
    one = replace(config(ask_within=0.5), depth=depth)
    task, seen = Grid(one), []

    class Spy(Grid):
        def loss(self, scores: Any, inputs: Any, *, progress: float, loops: int, part: Any = slice(None)) -> Any:
            seen.append(loops)
            return super().loss(scores, inputs, progress=progress, loops=loops, part=part)

    plans = plans_of(one, Clock(step=3))
    assert plans is not None
    model = one.model.build()
    moment = Moment(seed=0, step=3, micro_step=0, rank=0, progress=0.0)
    inputs = task.inputs(batch(), seed=0, device=CPU)
    loss = micro_batch_loss(model, Spy(one), inputs, moment, config=one, plans=plans)
    assert seen == [plans[0].supervised[0], len(plans[0].stages[0].loops)] and seen[1] - seen[0] == 2
    scores = model(inputs.model_input, moment.noise, plans)
    losses = [task.loss(s, inputs, progress=0.0, loops=end) for s, end in zip(scores, seen, strict=True)]
    assert torch.equal(loss, torch.stack(losses).sum() / 2)


def test_log_uniform_draws_every_order_of_magnitude_alike() -> None:
    depth = DepthConfig(loops="log_uniform", min_loops=10, max_loops=138, backprop_loops=10, supervise_every=2)
    plans = [depth_plans(depth, preset("reach"), seed=1, step=step, progress=0.0) for step in range(4000)]
    before = torch.tensor([plan[0].stages[0].num_detached for plan in plans if plan])
    assert len(before) == 4000 and before.min() == 0 and 115 < before.max() <= 128
    shares = torch.histc((before + 1).float().log2(), 7, 0, 7) / 4000
    assert (shares - 1 / 7.01).abs().max() < 0.025


def test_a_configuration_without_a_task_is_of_classification(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  seed: 3\n")
    assert from_yaml(file).task == "classification"
    file.write_text(to_yaml(override(config(), ["grid.ask_within=0.5"])))
    assert from_yaml(file) == config(ask_within=0.5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["task=grids"], "task: expected 'classification', 'grid', 'language' or 'translation', got 'grids'"),
        (["grid.ask_within=0"], "grid.ask_within: expected above 0, or null, got 0"),
        (["model.head=classes"], "task=grid needs a label for every token: set model.head=tokens"),
        (["task=classification"], "model.head=tokens labels every token: set task=grid"),
        (["distill.teacher=run:x"], "task=grid has no teacher"),
        (["model.stem=convolutions", "model.stem_strides=[2,1,1]"], "expected a token a pixel, got 4 tokens a side"),
    ],
)
def test_what_does_not_fit_a_grid_is_said(changes: list[str], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        task_of(override(config(), changes))
    assert said in str(caught.value), caught.value


def test_maps_that_do_not_fit_are_said() -> None:
    task, one = Grid(config(ask_within=0.5)), batch()
    with pytest.raises(ValueError, match="these shards have images and no maps"):
        task.inputs(replace(one, maps={}), seed=0, device=CPU)
    other = replace(one, maps={"map": one.maps["map"], "height": one.maps["map"]})
    with pytest.raises(ValueError, match=r"grid.ask_by=distance: these shards lack this attribute.* they have: height"):
        task.inputs(other, seed=0, device=CPU)
    with pytest.raises(ValueError, match=r"grid.bins=distance: these shards lack this attribute.* they have: height"):
        Grid(config(bins="distance")).counts(torch.zeros(4, CLASSES, SIDE, SIDE), other)
    one.maps["map"][2, 1, 1] = 7
    with pytest.raises(ValueError, match=r"sample 12: expected labels of 0 to 2 in its map.* got 7"):
        task.inputs(one, seed=0, device=CPU)
