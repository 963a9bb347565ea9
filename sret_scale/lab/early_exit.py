"""Early exit at inference: an image stops looping when its scores are sure or its stream stands still.

The rows of a batch that stopped leave the computation, so the multiply-adds counted are those that were done. Tokens of
stopped rows are still moved into the order of the rows that go on, which costs none.

confidence    stop when the largest probability reaches the threshold
entropy       stop when the entropy of the probabilities, over log C, falls to the threshold
convergence   stop when |x_k - x_(k-1)| / |x_k| of a loop falls to the threshold

The first two are asked after every loop of the last stage's last block, whose stream the head understands (train it
to, with `depth.supervised_loops`). Convergence is asked after every loop of every block; a row that stopped goes on
with the next block. Where the loop order is `model`, a loop is one round over all blocks of a stage.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from data_pipelines.stream.loader import Batch
from sret_scale.model import Application, SReT, SReTConfig, describe
from sret_scale.model.applications import ApplicationSpec, application_slots
from sret_scale.model.stage import chains_run_by
from sret_scale.model.vision.sret import as_sret
from sret_scale.train.distributed import Ranks, sum_over_ranks
from sret_scale.train.evaluate_main import Measure, evaluator_of

ExitKind = Literal["confidence", "entropy", "convergence"]
KINDS: tuple[ExitKind, ...] = get_args(ExitKind)
THRESHOLDS: dict[ExitKind, tuple[float, ...]] = {
    "confidence": (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
    "entropy": (0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0.03),
    "convergence": (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005),
}
"""Asked for by default, from the most eager to leave to the most reluctant."""


@dataclass(frozen=True, kw_only=True)
class ExitPoint:
    """What one threshold gives, as means over images; threshold None runs all loops."""

    threshold: float | None
    top1: float
    loss: float
    macs: float
    applications: float


class EarlyExit(nn.Module):
    """Scores of a model whose images stop by a rule; `count` adds up what was done for those of the last batch."""

    def __init__(self, model: SReT, kind: ExitKind, threshold: float) -> None:
        super().__init__()
        self.model, self.kind, self.threshold = model.eval(), kind, threshold
        self.done = torch.zeros(3, dtype=torch.float64)
        """Images, applications, multiply-adds."""
        self._applications_B = self._macs_B = torch.zeros(0, dtype=torch.float64)
        counts = describe(model.config)
        self._fixed_macs = counts["stem_macs"] + counts["pool_macs"] + counts["head_macs"]
        self._head_macs = counts["head_macs"]
        self._slot_macs = [application_macs(model.config, index) for index in range(len(model.config.stages))]
        self.eval()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, C) scores."""
        self._applications_B = torch.zeros(len(images_BCHW), dtype=torch.float64, device=images_BCHW.device)
        self._macs_B = torch.full_like(self._applications_B, self._fixed_macs)
        with chains_run_by(self.model.stages, lambda index: partial(self._run, index)):
            scores_BC: Tensor = self.model(images_BCHW)
        return scores_BC

    def count(self, valid_B: Tensor) -> None:
        """Add the last batch's rows that are images; the others fill it up."""
        work_KB = torch.stack([torch.ones_like(self._macs_B), self._applications_B, self._macs_B])
        self.done += work_KB.cpu()[:, valid_B].sum(dim=1)

    def after_batch(self, batch: Batch, scores_BC: Tensor) -> None:
        """Hear a batch of an evaluation."""
        self.count(batch.valid)

    def _run(self, index: int, applications: Sequence[Application], x_BND: Tensor) -> Tensor:
        for is_last_part, loops in parts(applications):
            may_stop: Callable[[Tensor, Tensor, Application], Tensor] | None = self._stands_still
            if self.kind != "convergence":
                is_readable = is_last_part and index == len(self.model.stages) - 1
                may_stop = self._is_sure if is_readable else None
            rows_R = torch.arange(len(x_BND), device=x_BND.device)
            for number, loop in enumerate(loops):
                moved_BND = x_BND
                for application in loop:
                    moved_BND = passed(application, moved_BND)
                if not len(rows_R):
                    x_BND = moved_BND
                    continue
                y_RND = x_BND[rows_R]
                for application in loop:
                    y_RND = application(y_RND)
                costs = self._slot_macs[index]
                self._applications_B[rows_R] += len(loop)
                self._macs_B[rows_R] += sum(costs[one.slot.block, one.slot.position] for one in loop)
                x_BND = moved_BND.index_copy(0, rows_R, y_RND)
                if may_stop is not None and number + 1 < len(loops):
                    if self.kind != "convergence":
                        self._macs_B[rows_R] += self._head_macs
                    rows_R = rows_R[~may_stop(y_RND, moved_BND[rows_R], loop[-1])]
        return x_BND

    def _is_sure(self, y_RND: Tensor, _: Tensor, application: Application) -> Tensor:
        stream_RND = y_RND.chunk(2, dim=1)[0] if application.injected else y_RND
        # The head takes means over the tokens, whose order and grid therefore do not matter.
        log_RC = self.model.forward_head(stream_RND.transpose(1, 2).unsqueeze(-1)).float().log_softmax(dim=-1)
        if self.kind == "confidence":
            return log_RC.max(dim=-1).values.exp() >= self.threshold
        return -(log_RC.exp() * log_RC).sum(dim=-1) / math.log(log_RC.shape[-1]) <= self.threshold

    def _stands_still(self, y_RND: Tensor, before_RND: Tensor, application: Application) -> Tensor:
        if application.injected:
            y_RND, before_RND = y_RND.chunk(2, dim=1)[0], before_RND.chunk(2, dim=1)[0]
        return (y_RND - before_RND).flatten(1).norm(dim=1) <= self.threshold * y_RND.flatten(1).norm(dim=1)


def parts(applications: Sequence[Application]) -> Iterator[tuple[bool, list[list[Application]]]]:
    """(whether it is the last, its loops) of the parts of a chain after which loops begin anew: its blocks one after
    another, or the whole chain where the blocks take turns."""
    last_block = max(one.slot.block for one in applications)
    is_by_block = all(a.slot.block <= b.slot.block for a, b in itertools.pairwise(applications))
    by_part = itertools.groupby(applications, lambda one: one.slot.block if is_by_block else last_block)
    for block, part in by_part:
        yield block == last_block, [list(loop) for _, loop in itertools.groupby(part, lambda one: one.slot.position)]


def passed(application: Application, state_BND: Tensor) -> Tensor:
    """The state with its tokens in the order in which the application leaves them, nothing else."""
    if not application.injected:
        return application.reordered(state_BND)
    return torch.cat([application.reordered(part) for part in state_BND.chunk(2, dim=1)], dim=1)


def application_macs(config: SReTConfig, index: int) -> dict[tuple[int, int], int]:
    """Multiply-adds of each application of a stage, by block and loop; together they are what `describe` counts."""
    stage, num_tokens = config.stages[index], config.grids[index] ** 2
    slots = application_slots(config, index)

    def attention(slot: ApplicationSpec) -> int:
        return num_tokens * (2 * stage.width * num_tokens // slot.groups)

    total = int(describe(config)["stages"][index]["macs"])
    each = (total - sum(map(attention, slots))) // len(slots)
    return {(slot.block, slot.loop): each + attention(slot) for slot in slots}


def exit_curve(
    model: SReT,
    kind: ExitKind,
    thresholds: Sequence[float],
    measure: Measure,
) -> list[ExitPoint]:
    """Accuracy against multiply-adds: all loops first, then every threshold; every rank must call it."""
    whole = measure(model)
    points = [
        ExitPoint(
            threshold=None,
            top1=whole.numbers["top1"],
            loss=whole.numbers["loss"],
            macs=describe(model.config)["macs"],
            applications=model.config.num_applications,
        )
    ]
    for threshold in thresholds:
        exiting = EarlyExit(model, kind, threshold)
        found = measure(exiting, exiting.after_batch)
        device = next(model.parameters()).device
        num_images, applications, macs = sum_over_ranks(exiting.done.to(device)).tolist()
        points.append(
            ExitPoint(
                threshold=threshold,
                top1=found.numbers["top1"],
                loss=found.numbers["loss"],
                macs=macs / num_images,
                applications=applications / num_images,
            )
        )
    return points


def exit_points(request: dict[str, Any], _: Ranks) -> list[dict[str, Any]]:
    """The curve that a request asks for, on every rank: run, shards, weights, loops, kind, thresholds."""
    model, measure = evaluator_of(Path(request["run"]), request["shards"], request["weights"], request["loops"])
    curve = exit_curve(as_sret(model, "early exit"), request["kind"], request["thresholds"], measure)
    return [vars(point) for point in curve]


def check_thresholds(kind: ExitKind, thresholds: Sequence[float]) -> None:
    """ValueError for a threshold that no image, or every image, would meet."""
    for threshold in thresholds:
        if not 0 < threshold < (math.inf if kind == "convergence" else 1):
            limit = "above 0" if kind == "convergence" else "above 0 and below 1"
            raise ValueError(f"--thresholds of {kind}: expected numbers {limit}, got {threshold:g}")
