"""The simplest learner that a deep model must beat: multinomial logistic regression on raw pixels."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.config import DataConfig
from data_pipelines.shards.index import ShardSet
from data_pipelines.stream.loader import evaluation_batches


def load_pixels(shards: ShardSet, image_size: int) -> tuple[Tensor, Tensor]:
    """(unit_NP, labels_N) of a whole small set: all P pixels of each image in [0, 1], float32."""
    config = DataConfig(crop="centre", eval_crop_rate=1.0)
    batches = evaluation_batches(shards, config, image_size=image_size, batch_size=500, rank=0, world_size=1)
    parts = [(batch.images[batch.valid], batch.labels[batch.valid]) for batch in batches]
    images = torch.cat([images for images, _ in parts])
    return images.flatten(1).float() / 255, torch.cat([labels for _, labels in parts])


def logistic_regression_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, num_classes: int, weight_decay: float = 1e-4
) -> float:
    """Top-1 on `test` of the L2-regularised softmax regression fitted to `train` by L-BFGS."""
    unit_NP, labels_N = train
    weight = torch.zeros(num_classes, unit_NP.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(unit_NP @ weight.T + bias, labels_N) + weight_decay * weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        predicted = (test[0] @ weight.T + bias).argmax(dim=1)
    return float(np.mean((predicted == test[1]).numpy()))
