"""Through how many loops a task's gradient must go: truncated gradients of a trained run against the whole one.

A truncated gradient may point elsewhere, whatever its size. Its likeness is the cosine; what it is worth is how much of
the loss a short step along it takes away, relative to a step of the same length along the whole one.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

from data_pipelines.stream.loader import evaluation_batches
from sret_scale.config.step_depth import share_of
from sret_scale.distill import DistillConfig
from sret_scale.lab.readable_numbers import binary_size
from sret_scale.lab.report import chart
from sret_scale.memory import MemoryConfig, apply_recomputation, predict_activations
from sret_scale.memory.planning.micro_batch import BatchSearch
from sret_scale.memory.planning.step_cost import DEVICES
from sret_scale.model import SReTConfig, StackModel, StageConfig
from sret_scale.model.depth_plan import DepthPlan, StageDepth
from sret_scale.tasks import task_of
from sret_scale.train.evaluate_main import load_model_of, open_shards
from sret_scale.train.telemetry.truncation import cosine, gradients

ALIKE = 0.9
STEP = 1e-3
"""Length of the step that is tried, relative to that of all weights."""


@dataclass(frozen=True)
class HorizonPoint:
    """Gradient through the last `loops` loops of the stage with most, and their share of the others.

    gain: what a short step along it takes from the loss. cosines: to the whole gradient, by class of parameters, `all`
    first. none_bytes, planned_bytes: predicted activations of a micro-batch, without recomputation and at the least
    that a plan needs.
    """

    loops: int
    gain: float
    cosines: dict[str, float]
    none_bytes: int
    planned_bytes: int


def horizon(run: Path, num_images: int) -> list[HorizonPoint]:
    """A point for each power of two below the loops of the run's model, and one for all of them.

    On images of the test set, with the task's loss at full depth, labels alone. ValueError or OSError where `run` is
    no run, or has no checkpoint.
    """
    if num_images < 1:
        raise ValueError(f"--images: expected at least 1, got {num_images}")
    shards, config = open_shards(run, None)
    model, _, _ = load_model_of(run, None, None)
    task = task_of(replace(config, distill=DistillConfig()))
    micro = min(config.train.micro_batch_size, num_images, shards.num_samples)
    apply_recomputation(model, MemoryConfig(schedule="binomial"))
    stages, most = config.model.stages, max(stage.num_loops for stage in config.model.stages)
    batches = evaluation_batches(
        shards, config.data, image_size=config.vision.image_size, batch_size=micro, rank=0, world_size=1
    )
    # The last batch may be filled up with what is no image.
    whole_batches = (batch for batch in batches if bool(batch.valid.all()))
    inputs = [
        task.inputs(one, seed=0, device=torch.device("cpu")) for one in islice(whole_batches, num_images // micro)
    ]

    def measured(plan: DepthPlan) -> tuple[float, dict[str, Tensor]]:
        """The mean over the batches of the loss and of its gradient."""
        loss, total = 0.0, {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
        for one in inputs:
            loss_of = partial(task.loss, inputs=one, progress=1.0, loops=stages[-1].num_loops)
            own, gradient = gradients(model, one.model_input, loss_of, None, plan)
            loss += own / len(inputs)
            for name, value in gradient.items():
                total[name] += value / len(inputs)
        return loss, total

    kinds: dict[str, list[str]] = {"all": [name for name, _ in model.named_parameters()]}
    for name, tag in model.parameter_tags().items():
        kinds.setdefault(tag.kind, []).append(name)
    (before, whole), points = measured(through_last(stages, most)), []
    for count in [*(2**power for power in range(most.bit_length()) if 2**power < most), most]:
        plan = through_last(stages, count)
        gradient = measured(plan)[1]
        with stepped(model, gradient):
            gain = before - measured(through_last(stages, 1))[0]
        cosines = {k: cosine([gradient[n] for n in own], [whole[n] for n in own]) for k, own in kinds.items()}
        points.append(HorizonPoint(count, gain, cosines, *activation_bytes(config.vision, micro, plan)))
    return points


def through_last(stages: Sequence[StageConfig], count: int) -> DepthPlan:
    """All loops, with gradient through the last `count` of the stage with most, and that share of the others."""
    most = max(stage.num_loops for stage in stages)
    depths = ((one.num_loops, one.num_loops - share_of(count, one.num_loops, most)) for one in stages)
    return DepthPlan(tuple(StageDepth(tuple(range(loops)), detached) for loops, detached in depths))


def activation_bytes(config: SReTConfig, micro_batch_size: int, plan: DepthPlan) -> tuple[int, int]:
    """Predicted for a micro-batch: without recomputation, and at the least that a plan needs."""
    none = MemoryConfig(schedule="none")
    search = BatchSearch(config, "fp32", DEVICES["cpu"], depth=plan).search(micro_batch_size)
    taken = predict_activations(config, none, micro_batch_size=micro_batch_size, depth=plan)
    return taken, search.smallest_bytes()


@contextlib.contextmanager
def stepped(model: StackModel, gradient: dict[str, Tensor]) -> Iterator[None]:
    """Inside the `with` the weights have gone a short step down the gradient."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    sizes = [math.sqrt(sum(float(one.square().sum()) for one in side.values())) for side in (before, gradient)]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.sub_(gradient[name], alpha=STEP * sizes[0] / sizes[1] if sizes[1] else 0.0)
    yield
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(before[name])


def in_words(points: Sequence[HorizonPoint]) -> str:
    """How many loops the gradient needs, and what they take; "needs" is likeness of the gradient at these weights."""
    alike = [not point.cosines["all"] < ALIKE for point in points]
    # From where on all are: one alone may be alike by chance.
    need = points[len(points) - next((n for n, one in enumerate(reversed(alike)) if not one), len(points))]
    return (
        f"this task needs k = {need.loops:,} of {points[-1].loops:,} loops with gradient (from there on the truncated "
        f"gradient's cosine to the whole one is {ALIKE} or more): {binary_size(need.none_bytes)} of activations a "
        f"micro-batch, {binary_size(need.planned_bytes)} at the least planned; all loops take "
        f"{binary_size(points[-1].none_bytes)} and {binary_size(points[-1].planned_bytes)}"
    )


def horizon_figure(name: str, points: Sequence[HorizonPoint], index: int) -> chart.Chart:
    """Cosines by class of parameters, and the gain of a step, over the loops with gradient."""
    caption = chart.Caption(
        name=f"horizon_{index}",
        title=f"How deep the gradient of {name} must go",
        text="Cosine between gradients through the last loops and through all, by class of parameters; dashed: what a "
        "short step along it takes from the loss, relative to one along the whole gradient.",
        x_label="loops with gradient",
        y_label="cosine, share of gain",
    )
    kinds, counts, full = list(points[0].cosines), [point.loops for point in points], points[-1].gain
    gains = [point.gain / full if full else math.nan for point in points]
    with mpl.rc_context(chart.STYLE):
        figure, axes = chart.canvas_above_legend(caption, len(kinds) + 1)
        for kind, colour in zip(kinds, chart.run_colours(len(kinds)), strict=True):
            axes.plot(counts, [one.cosines[kind] for one in points], "o-", color=colour, markersize=3.5, label=kind)
        axes.plot(counts, gains, color=chart.INK, linestyle=(0, (4, 3)), label="gain of a step")
        chart.log_count_axis(axes, counts)
        chart.legend(figure)
        table: list[tuple[object, ...]] = [
            ("loops_with_gradient", *(f"cosine_{kind}" for kind in kinds), "gain", "none_bytes", "planned_bytes")
        ]
        table += [(one.loops, *one.cosines.values(), one.gain, one.none_bytes, one.planned_bytes) for one in points]
        return chart.finish(figure, caption, table)
