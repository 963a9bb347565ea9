"""What each loop of a trained model is worth: its accuracy with the loop left out, repeated, or swapped with the next.

A change is made to that loop of every block of a stage. Tokens keep the order that the place in the chain gives, so
that a change of the loop is not also one of the slicing.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from data_pipelines.image.augment import normalise
from data_pipelines.stream.loader import evaluation_batches
from sret_scale.lab.early_exit import passed
from sret_scale.lab.readable_numbers import evenly
from sret_scale.lab.report.chart import MUTED, PALETTE, PAPER, STYLE, WIDTH_INCHES, Caption, Chart, finish
from sret_scale.model import StackModel
from sret_scale.model.stage import Application, chains_run_by
from sret_scale.train.evaluate_main import open_shards, require_classes
from sret_scale.train.load_run import load_model

Change = Literal["left out", "repeated", "swapped"]
Chain = Sequence[Callable[[Tensor], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A trained model in eval mode and the first images of its test set, normalised. B micro-batch, C classes."""

    name: str
    model: StackModel
    batches: tuple[tuple[Tensor, Tensor], ...]

    @property
    def num_images(self) -> int:
        """How many images the batches have."""
        return sum(len(labels_B) for _, labels_B in self.batches)


def open_subject(run: Path, num_images: int, report: Callable[[str], None]) -> Subject:
    """The model of a run, with its average where it keeps one, on the first `num_images` of its test set.

    Raises FileNotFoundError or ValueError for a folder that is no run, or has no checkpoint or test images.
    """
    if num_images < 1:
        raise ValueError(f"--images: expected at least 1, got {num_images}")
    shards, config = open_shards(run, None)
    require_classes(config, run)
    model, weights, step = load_model(run, None, report)
    report(f"{run}: {weights} weights of step {step}, {config.model.num_applications} applications")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches, count = [], 0
    for batch in evaluation_batches(
        shards,
        config.data,
        image_size=config.images.image_size,
        batch_size=min(config.train.micro_batch_size, num_images),
        rank=0,
        world_size=1,
    ):
        valid_B = batch.valid.clone()
        valid_B[max(0, num_images - count) :] = False
        images_BCHW = normalise(batch.images[valid_B].float() / 255, config.train.image_mean, config.train.image_std)
        batches.append((images_BCHW.to(device), batch.labels[valid_B].to(device)))
        count += int(valid_B.sum())
        if count >= num_images:
            break
    return Subject(name=run.resolve().name, model=model.to(device), batches=tuple(batches))


@torch.inference_mode()
def measure(model: nn.Module, subject: Subject) -> tuple[float, float]:
    """(mean cross-entropy, top-1 ratio) on the subject's images; NaN for a loss that is not finite."""
    loss, right = 0.0, 0
    for images_BCHW, labels_B in subject.batches:
        logits_BC = model(images_BCHW).float()
        loss += float(F.cross_entropy(logits_BC, labels_B, reduction="sum"))
        right += int((logits_BC.argmax(dim=1) == labels_B).sum())
    return loss / subject.num_images, right / subject.num_images


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Accuracy and loss after one change; `loop` of a swap is the earlier one."""

    stage: int
    loop: int
    change: Change
    top1: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class LoopStudy:
    """The unchanged model's accuracy and loss, and those of every change."""

    name: str
    top1: float
    loss: float
    effects: tuple[Effect, ...]


def study_loops(subject: Subject, *, most_loops: int) -> LoopStudy:
    """All changes to up to `most_loops` loops of each stage, spread evenly; the model ends as it was."""
    if most_loops < 1:
        raise ValueError(f"--loops: expected at least 1, got {most_loops}")
    loss, top1 = measure(subject.model, subject)
    effects = []
    for index, module in enumerate(subject.model.stages):
        num_loops = subject.model.config.stages[index].num_loops
        for loop in evenly(num_loops, most_loops):
            for change in get_args(Change):
                if change == "swapped" and loop + 1 == num_loops:
                    continue
                with chains_run_by([module], functools.partial(_runner, loop, change)):
                    changed_loss, changed_top1 = measure(subject.model, subject)
                effects.append(Effect(stage=index, loop=loop, change=change, top1=changed_top1, loss=changed_loss))
    return LoopStudy(name=subject.name, top1=top1, loss=loss, effects=tuple(effects))


def _runner(loop: int, change: Change, _stage: int) -> Callable[[Sequence[Application], Tensor], Tensor]:
    def run_chain(applications: Sequence[Application], x_BND: Tensor) -> Tensor:
        for step in changed_chain(applications, loop, change):
            x_BND = step(x_BND)
        return x_BND

    return run_chain


def changed_chain(applications: Sequence[Application], loop: int, change: Change) -> Chain:
    """The chain with one loop of every block changed."""
    at = {(application.slot.block, application.slot.loop): application for application in applications}
    chain: list[Callable[[Tensor], Tensor]] = []
    for application in applications:
        block, own = application.slot.block, application.slot.loop
        if change == "swapped" and own in (loop, loop + 1):
            other = at[block, 2 * loop + 1 - own]
            chain.append(replace(application, slot=other.slot, projection=other.projection))
        elif change == "left out" and own == loop:
            # Only its reordering of the tokens, which the next one builds upon.
            chain.append(functools.partial(passed, application))
        else:
            chain.append(application)
            if change == "repeated" and own == loop:
                chain.append(replace(application, gather=None, scatter=None))
    return chain


def in_lines(study: LoopStudy) -> list[str]:
    """A line for each kind of change: the loop that is missed most."""
    lines = []
    for change in get_args(Change):
        worst = min((e for e in study.effects if e.change == change), key=lambda e: e.top1, default=None)
        if worst is not None:
            lines.append(
                f"{study.name}: {100 * study.top1:.1f} % top-1; loop {worst.loop} of stage {worst.stage} "
                f"{change}: {100 * worst.top1:.1f} %, the most harm of that kind"
            )
    return lines


def loop_figure(study: LoopStudy, index: int) -> Chart:
    """Accuracy after each change of a loop, a panel a stage, with the unchanged accuracy as a line."""
    stages = sorted({effect.stage for effect in study.effects})
    caption = Caption(
        name=f"loops_{index}",
        title=f"What each loop of {study.name} is worth",
        text=f"Top-1 with one loop of all blocks of a stage left out, run twice, or swapped with the next. Dashed: the "
        f"unchanged model, {100 * study.top1:.1f} %.",
        x_label="loop",
        y_label="top-1, %",
    )
    height = 0.7 + 1.7 * len(stages)
    colours = dict(zip(("left out", "repeated", "swapped"), PALETTE, strict=False))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height), facecolor=PAPER)
        figure.subplots_adjust(left=0.1, right=0.97, bottom=0.62 / height, top=1 - 0.28 / height, hspace=0.45)
        for place, stage in enumerate(stages):
            axes = figure.add_subplot(len(stages), 1, place + 1)
            axes.set_title(f"stage {stage}: top-1, %", loc="left", fontsize=8.5, color=MUTED, pad=3)
            axes.axhline(100 * study.top1, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
            for change, colour in colours.items():
                own = [(e.loop, 100 * e.top1) for e in study.effects if (e.stage, e.change) == (stage, change)]
                if own:
                    label = change if place == 0 else None
                    axes.plot(*zip(*own, strict=True), "o-", color=colour, markersize=3.5, linewidth=1.0, label=label)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("loop")
        figure.legend(frameon=False, fontsize=8.5, labelcolor=MUTED, loc="lower left", ncols=3, borderaxespad=0.2)
        table: list[tuple[object, ...]] = [
            ("stage", "loop", "change", "top1", "loss"),
            ("", "", "none", study.top1, study.loss),
        ]
        table += [(e.stage, e.loop, e.change, e.top1, e.loss) for e in study.effects]
        return finish(figure, caption, table)
