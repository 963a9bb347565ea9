"""Streaming of shards as the writer makes them."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.shards.index import ShardSet, open_shards
from data_pipelines.stream.loader import DataConfig, LoaderState, TrainLoader, evaluation_batches
from data_pipelines.writing.write import WriteConfig, write_shards

SAMPLE = Path(__file__).parents[2] / "data_pipelines" / "sample" / "fashion_mnist"
SMALL = DataConfig(crop="padded", crop_padding=2, eval_crop_rate=1.0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    target = tmp_path_factory.mktemp("fashion")
    write_shards(WriteConfig(kind="idx", source=SAMPLE, split="test", shard_samples=300), target, num_workers=1)
    return open_shards(target)


def test_an_epoch_shows_every_image_once(shards: ShardSet) -> None:
    loaders = [
        TrainLoader(
            shards, SMALL, image_size=28, seed=0, rank=rank, world_size=2, micro_batch_size=25, grad_accum_steps=2
        )
        for rank in range(2)
    ]
    indices: list[int] = []
    labels: Counter[int] = Counter()
    for loader in loaders:
        for step in islice(loader.steps(LoaderState()), loader.steps_per_epoch):
            for batch in step.micro_batches:
                indices += batch.indices.tolist()
                labels.update(batch.labels.tolist())
                assert batch.images.float().std(dim=(1, 2, 3)).min() > 0
    assert sorted(indices) == list(range(2000))
    assert labels == Counter(dict.fromkeys(range(10), 200))


def test_evaluation_shows_the_stored_pixels(shards: ShardSet) -> None:
    batches = list(evaluation_batches(shards, SMALL, image_size=28, batch_size=128, rank=0, world_size=1))
    labels = torch.cat([batch.labels[batch.valid] for batch in batches])
    assert np.array_equal(labels.numpy(), shards.label)
    grey = torch.cat([batch.images for batch in batches])
    assert torch.equal(grey[:, 0], grey[:, 2])
