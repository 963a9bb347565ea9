"""BatchNorm's statistics for weights that no training step has seen: those of the moving average.

Averaged statistics belong to the weights that they were averaged along with, not to the averaged weights. Here they are
measured: layer by layer, over training images, cropped as in training but not mixed, the same ones on any number of
ranks. A layer sees the statistics of those before it, so the cut of the batches does not matter.
"""

import contextlib
import dataclasses
from itertools import islice

import torch
from torch import Tensor, nn

from data_pipelines.image.augment import normalise
from data_pipelines.shards.index import ShardSet
from data_pipelines.stream.loader import Batch, LoaderState, TrainLoader
from sret_scale.config.ds_config import load_ds_config, precision_of
from sret_scale.config.precision import autocast
from sret_scale.config.run_config import RunConfig, grad_accum_steps
from sret_scale.model import StackModel
from sret_scale.train.distributed import Ranks, sum_over_ranks


@torch.no_grad()
def measured_statistics(model: StackModel, shards: ShardSet, config: RunConfig, ranks: Ranks) -> dict[str, Tensor]:
    """The running mean and variance of every BatchNorm of `model` by name, which are set in it too; empty without any.

    Over `optim.ema_statistics_images` images, rounded up to whole global batches. The model is in eval mode on the
    ranks' device. All ranks must call it.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    if not norms or not config.optim.ema_statistics_images:
        return {}
    assert not model.training and all(name.startswith("stem.") for name in norms)
    batches = training_batches(shards, config, ranks)
    statistics = {}
    for name, norm in norms.items():
        assert norm.running_mean is not None and norm.running_var is not None
        count, total, squares = sum_over_ranks(_moments(model, norm, batches, config, ranks))
        mean = total / count
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((squares / count - mean.square()) * (count / (count - 1)))
        statistics[f"{name}.running_mean"] = norm.running_mean.clone()
        statistics[f"{name}.running_var"] = norm.running_var.clone()
    return statistics


def training_batches(shards: ShardSet, config: RunConfig, ranks: Ranks) -> list[Batch]:
    """This rank's share of the images; their order is another one than the training's.

    Of a training loader, which replaces bad samples: an evaluation's reader would stop at the first.
    """
    loader = TrainLoader(
        shards,
        dataclasses.replace(config.data, fetch_ahead_steps=1),
        image_size=config.images.image_size,
        seed=config.train.seed + 1,
        rank=ranks.rank,
        world_size=ranks.world_size,
        micro_batch_size=config.train.micro_batch_size,
        grad_accum_steps=grad_accum_steps(config.train, ranks.world_size),
    )
    num_steps = -(-config.optim.ema_statistics_images // config.train.global_batch_size)
    with contextlib.closing(loader.steps(LoaderState())) as steps:
        return [batch for step in islice(steps, num_steps) for batch in step.micro_batches]


def _moments(model: StackModel, norm: nn.BatchNorm2d, batches: list[Batch], config: RunConfig, ranks: Ranks) -> Tensor:
    """(3, C) number, sum and sum of squares of what comes into `norm`, over this rank's images, in float64."""
    sums = torch.zeros(3, norm.num_features, dtype=torch.float64, device=ranks.device)
    precision = precision_of(load_ds_config(config.engine.ds_config))
    incoming: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, inputs: incoming.append(inputs[0]))
    try:
        for batch in batches:
            unit_BCHW = batch.images.to(ranks.device).float() / 255
            with autocast(ranks.device.type, precision):
                model.stem(normalise(unit_BCHW, config.train.image_mean, config.train.image_std))
            x_BCHW = incoming.pop().double()
            sums[0] += x_BCHW.numel() / norm.num_features
            sums[1] += x_BCHW.sum(dim=(0, 2, 3))
            sums[2] += x_BCHW.square().sum(dim=(0, 2, 3))
    finally:
        handle.remove()
    return sums
