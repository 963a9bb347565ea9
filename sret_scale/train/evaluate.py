"""What a task counts of a model on a whole split, exact on any world size. B batch."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines.shards.index import ShardSet
from data_pipelines.stream.loader import Batch, evaluation_batches
from sret_scale.config.ds_config import load_ds_config, precision_of
from sret_scale.config.precision import autocast
from sret_scale.config.run_config import RunConfig
from sret_scale.tasks import task_of
from sret_scale.tasks.task import Task
from sret_scale.train.distributed import Ranks, ranks_from_environment, sum_over_ranks

AfterBatch = Callable[[Batch, Tensor], None]
"""Hears each batch of an evaluation with its scores, rows that only fill it up included."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The task's numbers over `num_samples` samples, each counted once; `images_per_s` is of all ranks together."""

    numbers: Mapping[str, float]
    num_samples: int
    images_per_s: float

    def to_json(self) -> dict[str, Any]:
        """One flat object, as metrics.jsonl and `evaluate --json` have it."""
        return {**self.numbers, "num_samples": self.num_samples, "images_per_s": self.images_per_s}


def evaluate(
    model: nn.Module,
    shards: ShardSet,
    config: RunConfig | None = None,
    ranks: Ranks | None = None,
    task: Task | None = None,
    *,
    must_stop: Callable[[], bool] = lambda: False,
    after_batch: AfterBatch = lambda batch, scores: None,
) -> Evaluation | None:
    """What the task counts of `model` (in eval mode, on the ranks' device), in the precision of training.

    Every rank must call it. None when `must_stop` said so between two batches on any rank.
    """
    assert not model.training
    config = config or RunConfig(model=model.config)  # type: ignore[arg-type]  # an SReT where nothing else is said
    ranks = ranks or ranks_from_environment()
    task = task or task_of(config)
    ds_config = load_ds_config(config.engine.ds_config)
    precision = precision_of(ds_config)
    started = time.monotonic()
    totals = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for batch in evaluation_batches(
        shards,
        config.data,
        **config.model.sample_size,
        batch_size=config.train.micro_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
    ):
        model_input = task.evaluation_input(batch, ranks.device)
        # Around the model alone: in inference mode the loader would make batches that nobody may write to.
        with torch.inference_mode(), autocast(ranks.device.type, precision):
            scores = model(model_input).float()
        after_batch(batch, scores)
        totals = totals + task.counts(scores, batch).sum(dim=0)
        if _any_rank(must_stop(), ranks):
            return None
    counts = sum_over_ranks(totals).tolist()
    assert counts[0] == shards.num_samples, "evaluation must see every sample exactly once"
    return Evaluation(
        numbers=task.numbers(counts),
        num_samples=int(counts[0]),
        images_per_s=counts[0] / (time.monotonic() - started),
    )


def _any_rank(flag: bool, ranks: Ranks) -> bool:
    """Whether any rank says so. One that is alone need not wait for its device to know."""
    if ranks.world_size == 1:
        return flag
    return bool(sum_over_ranks(torch.tensor(float(flag), device=ranks.device)) > 0)
