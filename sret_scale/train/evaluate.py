"""Accuracy of a model on a whole split, exact on any world size. C classes, B batch."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.image.normalise import Normaliser
from data_pipelines.shards.index import ShardSet
from data_pipelines.stream.loader import evaluation_batches
from sret_scale.config.ds_config import load_ds_config, precision_of
from sret_scale.config.precision import autocast
from sret_scale.config.run_config import RunConfig
from sret_scale.model.upload import uploaded
from sret_scale.train.distributed import Ranks, sum_over_ranks


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over `num_samples` samples, each counted once; `images_per_s` is of all ranks together."""

    top1: float
    top5: float
    loss: float
    num_samples: int
    images_per_s: float


def evaluate(
    model: nn.Module,
    shards: ShardSet,
    config: RunConfig,
    ranks: Ranks,
    *,
    must_stop: Callable[[], bool] = lambda: False,
    after_batch: Callable[[Tensor], None] = lambda valid_B: None,
) -> Evaluation | None:
    """Top-1, top-5 and cross-entropy of `model` (in eval mode, on the ranks' device), in the precision of training.

    Every rank must call it. `after_batch` hears which rows of each batch are samples. None when `must_stop` said so
    between two batches on any rank.
    """
    assert not model.training
    ds_config = load_ds_config(config.engine.ds_config)
    precision = precision_of(ds_config)
    started = time.monotonic()
    totals = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    normalise = Normaliser(config.train.image_mean, config.train.image_std)
    for batch in evaluation_batches(
        shards,
        config.data,
        image_size=config.model.image_size,
        batch_size=config.train.micro_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
    ):
        images_BCHW = normalise(batch.images.to(ranks.device, non_blocking=True))
        # Around the model alone: in inference mode the loader would make batches that nobody may write to.
        with torch.inference_mode(), autocast(ranks.device.type, precision):
            logits_BC = model(images_BCHW).float()
        after_batch(batch.valid)
        valid_B = uploaded(batch.valid, ranks.device)
        totals += count(logits_BC, batch.labels.to(ranks.device, non_blocking=True), valid_B)
        if _any_rank(must_stop(), ranks):
            return None
    num_samples, top1, top5, loss = sum_over_ranks(totals).tolist()
    assert num_samples == shards.num_samples, "evaluation must see every sample exactly once"
    return Evaluation(
        top1=top1 / num_samples,
        top5=top5 / num_samples,
        loss=loss / num_samples,
        num_samples=int(num_samples),
        images_per_s=num_samples / (time.monotonic() - started),
    )


def _any_rank(flag: bool, ranks: Ranks) -> bool:
    """Whether any rank says so. One that is alone need not wait for its device to know."""
    if ranks.world_size == 1:
        return flag
    return bool(sum_over_ranks(torch.tensor(float(flag), device=ranks.device)) > 0)


def count(logits_BC: Tensor, labels_B: Tensor, valid_B: Tensor) -> Tensor:
    """(samples, right at top 1, right within top 5, summed cross-entropy) of the valid rows, as float64."""
    top_BK = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices
    hit_BK = (top_BK == labels_B[:, None]) & valid_B[:, None]
    loss_B = F.cross_entropy(logits_BC, labels_B, reduction="none")
    return torch.stack(
        [
            valid_B.sum().double(),
            hit_BK[:, 0].sum().double(),
            hit_BK.sum().double(),
            # What a padded row gives may be no number.
            torch.where(valid_B, loss_B.double(), 0.0).sum(),
        ]
    )
