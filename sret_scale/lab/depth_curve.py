"""A trained model's answers after chosen numbers of block applications, all from one pass: how right they are, and
whether the model has settled.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipelines.image.map_png import IGNORED
from data_pipelines.stream.loader import Batch
from sret_scale.lab.report.evaluation_depth import curve_of, evaluation_depth_figures
from sret_scale.model import StackConfig, StackModel
from sret_scale.model.read_out import ReadOut, read_outs
from sret_scale.runs.checkpoint import list_checkpoints, read_state
from sret_scale.runs.run_folder import RunFolder
from sret_scale.tasks import task_of
from sret_scale.tasks.task import Task
from sret_scale.train.distributed import Ranks, from_all_ranks
from sret_scale.train.evaluate import evaluate
from sret_scale.train.evaluate_main import load_model_of, open_shards
from sret_scale.train.telemetry.trackers import open_metrics

MEAN_OF = 30
"""Loops whose scores a mean is of, and in which flicker and periods are looked for."""
SAME = 1e-3
"""Scores that differ by less, relative to their size, are taken as equal."""
RESAMPLES = 1000

Point = dict[str, Any]
"""`applications`, `read_out`, every number of the task with `_low` and `_high`, and the signs of having settled."""


class OnTheWay(nn.Module):
    """Scores of a model after the most loops; `after_batch` keeps what a task counts after each of `counts` of them."""

    def __init__(self, model: StackModel, task: Task, counts: Sequence[int]) -> None:
        super().__init__()
        self.model, self.task, self.counts = model, task, counts
        self.rows: dict[tuple[int, str], list[Tensor]] = {(n, kind): [] for n in counts for kind in ("last", "mean")}
        self.signs: dict[int, list[Tensor]] = {count: [] for count in counts}
        self._reads: list[ReadOut] = []

    def forward(self, images_BCHW: Tensor) -> Tensor:
        self._reads = list(read_outs(self.model, images_BCHW, self.counts, mean_of=MEAN_OF))
        return self._reads[-1].last

    def after_batch(self, batch: Batch, _: Tensor) -> None:
        """Hear a batch of an evaluation."""
        for read in self._reads:
            for kind, scores in (("last", read.last), ("mean", read.mean)):
                self.rows[read.loops, kind].append(self.task.counts(scores.float(), batch).cpu()[batch.valid])
            signs_B3 = torch.stack([read.steps.cpu(), flicker(read, batch), period(read.recent)], dim=1)
            self.signs[read.loops].append(signs_B3.double()[batch.valid])


def flicker(read: ReadOut, batch: Batch) -> Tensor:
    """(B,) the share of an image's answers that are others in one of the recent loops than in the last one."""
    answers = [scores.argmax(dim=1).flatten(1) if scores.ndim > 2 else scores.argmax(1, True) for scores in read.recent]
    changes_BN = torch.stack([one != answers[-1] for one in answers]).any(dim=0).cpu()
    is_asked_BN = batch.maps["map"].flatten(1) != IGNORED if "map" in batch.maps else torch.ones_like(changes_BN)
    return (changes_BN & is_asked_BN).sum(dim=1) / is_asked_BN.sum(dim=1).clamp(min=1)


def period(recent: Sequence[Tensor]) -> Tensor:
    """(B,) after how many loops the scores of an image come again, in the two last loops: 1 rests; 0 for no period."""
    scores = [one.flatten(1).float().cpu() for one in recent]
    found_B = torch.zeros(len(scores[0]))
    for length in range((len(scores) - 1) // 2, 0, -1):
        is_same_B = torch.ones(len(found_B), dtype=torch.bool)
        for now, before in ((scores[-1], scores[-1 - length]), (scores[-2], scores[-2 - length])):
            is_same_B &= (now - before).norm(dim=1) <= SAME * now.norm(dim=1)
        found_B[is_same_B] = length
    return found_B


def depth_curve(request: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """What a request asks for, as one line of metrics.jsonl holds it; on every rank.

    request: run, shards (None: the run's test set), weights, applications, image_size (None: the run's).
    """
    run, applications = Path(request["run"]), request["applications"]
    shards, config = open_shards(run, request["shards"], request["image_size"])
    image_size = config.images.image_size
    model, weights, step = load_model_of(run, request["weights"], None, request["image_size"])
    counts = loops_after(model.config, applications)
    stages = model.config.stages
    task = task_of(config)
    model = model.with_loops([*(stage.num_loops for stage in stages[:-1]), max(stages[-1].num_loops, counts[-1])])
    on_the_way = OnTheWay(model.to(ranks.device), task, counts).eval()
    result = evaluate(on_the_way, shards, config, ranks, task, after_batch=on_the_way.after_batch)
    assert result is not None, "nothing here asks it to stop"
    points = [
        {"applications": number, "read_out": kind, **_numbers(task, on_the_way.rows[count, kind]), **signs}
        for number, count in zip(applications, counts, strict=True)
        for signs in [_signs(on_the_way.signs[count])]
        for kind in ("last", "mean")
    ]
    state = read_state(list_checkpoints(RunFolder(run).checkpoints)[0])
    split = "test" if request["shards"] is None else str(shards.folder)
    return {
        **{"step": step, "images": state["images"], "time_s": state["time_s"], "weights": weights},
        **{"split": f"{split} at {image_size} px", "image_size": image_size},
        **{"best": task.best, "best_in_words": task.best_in_words, "num_samples": result.num_samples},
        **{"parameters": sum(one.numel() for one in model.parameters()), "points": points},
    }


def loops_after(config: StackConfig, applications: Sequence[int]) -> list[int]:
    """The loops of the last stage that are behind a model after so many applications of all blocks.

    ValueError where its head gives no scores then: within an earlier stage, a round over blocks, or an earlier block.
    """
    *others, last = config.stages
    first, each, most = sum(stage.num_applications for stage in others), last.num_blocks, None
    if last.num_blocks > 1 and last.loop_order == "block":
        first, each, most = first + (last.num_blocks - 1) * last.num_loops, 1, last.num_loops
    found = []
    for number in applications:
        loops, rest = divmod(number - first, each)
        if rest or loops < 1 or (most and loops > most):
            after = f"{first + each:,}, {first + 2 * each:,}, ..." + (f", {first + most:,}" if most else "")
            raise ValueError(
                f"--applications: this model's last block gives scores after {after} applications, got {number:,}; "
                "--loops evaluates it at another depth"
            )
        found.append(loops)
    return found


def _numbers(task: Task, rows: list[Tensor]) -> dict[str, float]:
    """A task's numbers over all ranks' samples, each with the interval that holds 95 % of bootstrap samples."""
    rows_SK = np.concatenate([np.array(part).reshape(-1, rows[0].shape[1]) for part in _of_all(rows)])
    # In an order that the number of ranks does not change.
    rows_SK = rows_SK[np.lexsort(rows_SK.T)]
    numbers, random = task.numbers(rows_SK.sum(axis=0).tolist()), np.random.default_rng(0)
    drawn: dict[str, list[float]] = {name: [] for name in numbers}
    for _ in range(RESAMPLES):
        times_S = np.bincount(random.integers(len(rows_SK), size=len(rows_SK)), minlength=len(rows_SK))
        for name, value in task.numbers((times_S @ rows_SK).tolist()).items():
            drawn[name].append(value)
    for name, values in drawn.items():
        # A bin that few samples have may have no value in any resample.
        low, high = np.quantile(values or [numbers[name]], (0.025, 0.975))
        numbers |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return numbers


def _signs(rows: list[Tensor]) -> dict[str, float | None]:
    """Of having settled: mean displacement, share of answers that flicker, the commonest period and who has one."""
    steps, shares, periods = np.concatenate([np.array(part).reshape(-1, 3) for part in _of_all(rows)]).T
    lengths = np.bincount(periods.astype(int))
    common = int(lengths[1:].argmax()) + 1 if len(lengths) > 1 else None
    displacement = float(steps.mean()) if np.isfinite(steps).all() else None
    signs = {"displacement": displacement, "flicker": float(shares.mean()), "period": common}
    return {**signs, "periodic": float((periods > 0).mean())}


def _of_all(rows: list[Tensor]) -> list[list[list[float]]]:
    return from_all_ranks(torch.cat(rows).tolist())


def keep_curve(run: Path, line: dict[str, Any], folder: Path) -> list[Path]:
    """Append a curve to the run's metrics, and draw it into the folder, which is made: the figures' files."""
    with contextlib.ExitStack() as stack:
        open_metrics(RunFolder(run).metrics, (), stack).write("depth", line)
    folder.mkdir(exist_ok=True)
    curve = curve_of(run.name, line)
    return [file for chart in evaluation_depth_figures([curve] if curve else []) for file in chart.write(folder)]


def curve_table(line: dict[str, Any]) -> str:
    """A curve as aligned lines, a read-out each."""
    best = line["best"]
    rows = [f"{'applications':>12} {'read-out':>8} {line['best_in_words']:>11} {'95 % of resamples':>18} ..."]
    for point in line["points"]:
        settled = f"flicker {point['flicker']:.2%}" + (f", period {point['period']}" if point["period"] else "")
        more = f"balanced {point['balanced']:.2%}, {settled}" if "balanced" in point else settled
        interval = f"{point[f'{best}_low']:.2%} to {point[f'{best}_high']:.2%}"
        rows.append(f"{point['applications']:>12,} {point['read_out']:>8} {point[best]:>11.2%} {interval:>18}  {more}")
    return "\n".join(rows)
