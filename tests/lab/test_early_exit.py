"""Early exit: rows stop where the rule says, the rest is the model's own computation, and work is counted as done."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from data_pipelines.stream.loader import Batch
from sret_scale.lab import early_exit
from sret_scale.lab.analysis.exit_figure import exit_chart, exit_table
from sret_scale.lab.early_exit import EarlyExit, ExitPoint, application_macs, exit_curve
from sret_scale.model import SReT, SReTConfig, StageConfig, describe
from sret_scale.model import config as spec
from sret_scale.model.depth_plan import DepthPlan, StageDepth
from sret_scale.train.evaluate import AfterBatch, Evaluation
from tests.model.typed_stages import stages_of

STAGES = (
    StageConfig(width=8, num_heads=2, num_blocks=2, num_loops=3, groups=(4, 2)),
    StageConfig(width=16, num_heads=2, num_blocks=2, num_loops=4, groups=(2, 1), projections="per_block"),
)
CONFIG = SReTConfig(stages=STAGES, image_size=16, num_classes=5, stem_strides=(2, 1, 1))
IMAGES_BCHW = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ALL = torch.ones(6, dtype=torch.bool)


def model_of(**options: object) -> SReT:
    torch.manual_seed(0)
    model = SReT(replace(CONFIG, stages=tuple(replace(stage, **options) for stage in STAGES))).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("order", get_args(spec.LoopOrder))
@pytest.mark.parametrize("kind", ["confidence", "entropy"])
def test_scores_are_those_of_the_first_exit_that_is_sure(kind: str, order: str) -> None:
    model = model_of(loop_order=order)
    full = tuple(StageDepth(tuple(range(stage.num_loops))) for stage in STAGES)
    scores_KBC = model(IMAGES_BCHW, None, [DepthPlan(full, supervised=(1, 2, 3))])
    log_KBC = scores_KBC.log_softmax(-1)
    sure_KB = log_KBC.exp().amax(-1)
    if kind == "entropy":
        sure_KB = (log_KBC.exp() * log_KBC).sum(-1) / torch.tensor(5.0).log()
    ordered = sure_KB[:-1].flatten().sort().values
    threshold = float(ordered[8:10].mean())  # between two values, so that rounding decides nothing
    exits_B = [next((k for k in range(3) if sure_KB[k, row] >= threshold), 3) for row in range(6)]
    assert len(set(exits_B)) > 1
    exiting = EarlyExit(model, kind, threshold if kind == "confidence" else -threshold)  # type: ignore[arg-type]
    got_BC = exiting(IMAGES_BCHW)
    exiting.count(ALL)
    for row, k in enumerate(exits_B):
        torch.testing.assert_close(got_BC[row], scores_KBC[k, row])
    per_loop = 1 if order == "block" else 2
    before = 6 + 4 if order == "block" else 6
    assert exiting.done[1] == sum(before + (k + 1) * per_loop for k in exits_B)


@pytest.mark.lengthy
@pytest.mark.parametrize("kind", early_exit.KINDS)
@pytest.mark.parametrize("conditioning", ["none", "input_add"])
def test_without_an_exit_it_is_the_model(kind: early_exit.ExitKind, conditioning: str) -> None:
    model = model_of(conditioning=conditioning)
    chains = [stage.run_chain for stage in model.stages]
    exiting = EarlyExit(model, kind, {"confidence": 2.0, "entropy": -1.0, "convergence": 0.0}[kind])
    assert torch.equal(exiting(IMAGES_BCHW), model(IMAGES_BCHW))
    exiting.count(ALL)
    checks = 0 if kind == "convergence" else 3 * describe(model.config)["head_macs"]
    assert exiting.done[2] == 6 * (describe(model.config)["macs"] + checks)
    assert [stage.run_chain for stage in model.stages] == chains


@pytest.mark.lengthy
@pytest.mark.parametrize("order", get_args(spec.LoopOrder))
def test_rows_that_stand_still_skip_to_the_next_block(order: str) -> None:
    model = model_of(loop_order=order)
    eager = EarlyExit(model, "convergence", 1e9)
    got_BC = eager(IMAGES_BCHW)
    eager.count(ALL)
    # Everybody stops after the first loop of every block: the scores of the model whose later loops are left out.
    assert eager.done[1] == 6 * 4

    def first_loops(whole: Callable[[Any, Tensor], Tensor], applications: Sequence[Any], x_BND: Tensor) -> Tensor:
        return whole([one if one.slot.loop == 0 else Skip(one) for one in applications], x_BND)

    for stage in stages_of(model):
        stage.run_chain = partial(first_loops, stage.run_chain)
    torch.testing.assert_close(got_BC, model(IMAGES_BCHW))


class Skip:
    def __init__(self, application: object) -> None:
        self.application = application

    def __call__(self, x_BND: torch.Tensor) -> torch.Tensor:
        return early_exit.passed(self.application, x_BND)  # type: ignore[arg-type]


@pytest.mark.lengthy
def test_some_rows_stop_and_others_go_on_as_if_alone() -> None:
    model, done = model_of(), []
    for threshold in (0.2, 0.12):
        together = EarlyExit(model, "convergence", threshold)
        scores_BC = together(IMAGES_BCHW)
        together.count(ALL)
        alone = [EarlyExit(model, "convergence", threshold) for _ in IMAGES_BCHW]
        for row, one in enumerate(alone):
            torch.testing.assert_close(one(IMAGES_BCHW[row : row + 1])[0], scores_BC[row])
            one.count(ALL[:1])
        assert sum(one.done[2] for one in alone) == together.done[2]
        done.append([float(one.done[1]) for one in alone])
        # Rows that fill a batch up are run and not counted.
        some = EarlyExit(model, "convergence", threshold)
        some(IMAGES_BCHW)
        some.count(torch.arange(6) < 4)
        assert some.done.tolist() == sum(one.done for one in alone[:4]).tolist()
    assert any(len(set(counts)) > 1 for counts in done), done


def test_applications_cost_what_the_model_costs() -> None:
    config = model_of(loop_order="model", conditioning="norm_by_depth").config
    for index, row in enumerate(describe(config)["stages"]):
        costs = application_macs(config, index)
        assert sum(costs.values()) == row["macs"]
    assert costs[0, 0] < costs[0, 1]  # fewer groups, more attention


def test_the_curve_begins_with_all_loops(tmp_path: Path) -> None:
    model = model_of()

    def measure(one: torch.nn.Module, after_batch: AfterBatch = lambda batch, scores: None) -> Evaluation:
        assert not one.training
        scores_BC = one(IMAGES_BCHW)
        right = (scores_BC.argmax(-1) == torch.arange(6) % 5).double().mean().item()
        rows = torch.arange(6)
        views = {"views": rows, "view_numbers": rows}
        after_batch(Batch(images=IMAGES_BCHW, labels=rows % 5, indices=rows, valid=ALL, **views, maps={}), scores_BC)
        return Evaluation(numbers={"top1": right, "top5": 1.0, "loss": 1.5}, num_samples=6, images_per_s=1.0)

    points = exit_curve(model, "convergence", (1e9, 1e-9), measure)
    assert [point.threshold for point in points] == [None, 1e9, 1e-9]
    assert points[2].top1 == points[0].top1 and points[2].macs == points[0].macs
    assert points[1].macs < points[0].macs and points[1].applications == 4
    assert "all loops" in exit_table(points).splitlines()[1]
    files = exit_chart("run", "convergence", points).write(tmp_path / "curve")
    assert [file.name for file in files] == [f"early_exit_convergence.{kind}" for kind in ("svg", "png", "csv")]
    header, first, *_ = (tmp_path / "curve" / "early_exit_convergence.csv").read_text().splitlines()
    assert header == "threshold,top1,loss,macs,applications" and first.startswith(",")


def test_a_curve_of_one_point_is_drawn() -> None:
    point = ExitPoint(threshold=None, top1=0.5, loss=1.0, macs=1e6, applications=4)
    assert "<svg" in exit_chart("run", "entropy", [point, replace(point, threshold=0.5)]).svg


@pytest.mark.parametrize(("kind", "threshold"), [("confidence", 1.0), ("entropy", 0.0), ("convergence", -1.0)])
def test_a_useless_threshold_is_refused(kind: early_exit.ExitKind, threshold: float) -> None:
    with pytest.raises(ValueError, match=f"--thresholds of {kind}: expected numbers above 0"):
        early_exit.check_thresholds(kind, [threshold])


@pytest.mark.lengthy
@pytest.mark.multi_process
def test_inference_draws_nothing() -> None:
    code = (
        "import sys, sret_scale.lab.early_exit, sret_scale.lab.trained_model;"
        "print(sorted({'matplotlib', 'deepspeed'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
