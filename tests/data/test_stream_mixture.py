"""Mixtures: every set in proportion to its weight, each of its samples once a round, any position at once."""

import itertools
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.config import DataConfig
from data_pipelines.remote.shard_sets import open_training_data
from data_pipelines.shards.index import ShardSet, open_shards
from data_pipelines.stream.loader import LoaderState, TrainLoader
from data_pipelines.stream.order import Order, rank_positions
from data_pipelines.writing.write import WriteConfig, write_shards
from tests.data.stream_shards import jpeg, smooth_image

SIZES = {"a": 12, "b": 30, "c": 5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("mixture")
    for seed, (name, size) in enumerate(SIZES.items()):
        for index in range(size):
            path = root / "images" / name / f"class-{index % 2}" / f"{name}{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(smooth_image(12, 14, 100 * seed + index)))
        source = WriteConfig(kind="folder", source=root / "images" / name, shard_samples=7)
        write_shards(source, root / name, num_workers=1)
    return [root / name for name in SIZES]


def _config(folders: list[Path], weights: tuple[float, ...] = ()) -> DataConfig:
    return DataConfig(
        train_folder=str(folders[0]), mixture_folders=tuple(map(str, folders[1:])), mixture_weights=weights, workers=1
    )


def _loader(shards: ShardSet, config: DataConfig, *, world_size: int = 1) -> TrainLoader:
    return TrainLoader(
        shards,
        config,
        image_size=8,
        seed=0,
        rank=0,
        world_size=world_size,
        micro_batch_size=4,
        grad_accum_steps=1,
    )


def test_rows_are_those_of_their_own_set(folders: list[Path]) -> None:
    config = _config(folders)
    shards = open_training_data(config)
    parts = [open_shards(folder) for folder in folders]
    starts = np.cumsum([0, *SIZES.values()])
    assert shards.num_samples == 47 and shards.num_shards == sum(part.num_shards for part in parts)
    for part, start in zip(parts, starts[:-1], strict=True):
        for index in range(part.num_samples):
            assert shards.key(start + index) == part.key(index) and shards.label[start + index] == part.label[index]
    batches = [step.micro_batches[0] for step in islice(_loader(shards, config).steps(LoaderState()), 11)]
    for batch in batches:
        assert torch.equal(batch.labels, torch.from_numpy(shards.label[batch.indices.numpy()]).long())


@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.05, 10), min_size=4, max_size=4),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["full", "block", "sequential"]),
)
@settings(max_examples=50, deadline=None)
def test_sets_come_by_weight_and_go_round(sizes: list[int], weights: list[float], seed: int, kind: Any) -> None:
    weights = weights[: len(sizes)]
    total = sum(sizes)
    order = Order(
        kind=kind,
        fingerprint="f",
        seed=seed,
        shard_sizes=[part for size in sizes for part in (size // 2, size - size // 2)],
        global_batch_size=8,
        block_window=3,
        part_sizes=tuple(sizes),
        part_weights=tuple(weights),
    )
    drawn = np.stack([order.samples(epoch, np.arange(total)) for epoch in range(6)])
    bounds = np.cumsum([0, *sizes])
    for part, size in enumerate(sizes):
        of_part = [epoch[(epoch >= bounds[part]) & (epoch < bounds[part + 1])] - bounds[part] for epoch in drawn]
        assert len({len(draws) for draws in of_part}) == 1
        assert abs(len(of_part[0]) - total * weights[part] / sum(weights)) <= 1
        walk = np.concatenate(of_part)
        for start in range(0, len(walk) - size + 1, size):
            assert sorted(walk[start : start + size].tolist()) == list(range(size))


@pytest.mark.parametrize("kind", ["full", "block"])
def test_every_round_of_a_set_has_an_order_of_its_own(kind: Any) -> None:
    order = Order(
        kind=kind,
        fingerprint="f",
        seed=0,
        shard_sizes=[50] * 4,
        global_batch_size=8,
        block_window=60,
        part_sizes=(100, 100),
        part_weights=(3, 1),
    )
    drawn = np.concatenate([order.samples(epoch, np.arange(200)) for epoch in range(4)])
    rounds = drawn[drawn < 100].reshape(6, 100)
    assert all((one != other).mean() > 0.9 for one, other in itertools.combinations(rounds, 2))


def test_a_block_mixture_reads_few_shards_at_a_time_and_a_sequential_one_as_stored() -> None:
    sizes = (4000, 6000)
    options: dict[str, Any] = {"fingerprint": "f", "seed": 0, "shard_sizes": [100] * 100, "global_batch_size": 64}
    block = Order(kind="block", block_window=200, part_sizes=sizes, **options)
    positions = np.arange(10_000)
    drawn = block.samples(0, positions)
    for start in range(0, 10_000, 500):
        # Of each set: its share of 500 samples, and the window before and behind.
        assert len(np.unique(drawn[start : start + 500] // 100)) <= 5 + 2 * 5
    assert (drawn != block.samples(1, positions)).mean() > 0.9
    stored = Order(kind="sequential", part_sizes=sizes, **options).samples(0, positions)
    assert stored[:5].tolist() == [4000, 0, 4001, 1, 4002]
    for first, last in ((0, 4000), (4000, 10_000)):
        assert (np.diff(stored[(stored >= first) & (stored < last)]) == 1).all()


@pytest.mark.parametrize("order", ["full", "block", "sequential"])
def test_global_batches_of_a_mixture_are_those_of_any_number_of_ranks(folders: list[Path], order: Any) -> None:
    config = replace(_config(folders, (1.0, 2.0, 3.0)), order=order, block_window=4)
    sequence = Order.of(open_training_data(config), config, seed=1, global_batch_size=24)
    whole = sequence.samples(2, np.arange(24))
    for world_size in (2, 3, 8, 24):
        parts = [
            rank_positions(0, rank=rank, world_size=world_size, micro_batch_size=24 // world_size, grad_accum_steps=1)
            for rank in range(world_size)
        ]
        assert np.array_equal(sequence.samples(2, np.concatenate(parts).ravel()), whole)


def test_without_weights_an_epoch_is_every_sample_once(folders: list[Path]) -> None:
    config = _config(folders)
    order = Order.of(open_training_data(config), config, seed=1, global_batch_size=4)
    for epoch in range(3):
        assert sorted(order.samples(epoch, np.arange(47)).tolist()) == list(range(47))


def test_the_state_names_the_weights(folders: list[Path]) -> None:
    config = _config(folders, (1.0, 2.0, 3.0))
    shards = open_training_data(config)
    state = next(_loader(shards, config).steps(LoaderState())).next_state
    assert len(state.to_json()) < 200
    with pytest.raises(ValueError, match="belongs to another order"):
        _loader(shards, replace(config, mixture_weights=(1.0, 1.0, 1.0))).steps(state)


def test_what_cannot_be_mixed_is_named(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.mixture_weights: expected none, or 3 above 0"):
        _config(folders, (1.0, 2.0))
    image = tmp_path / "images" / "other" / "x.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(jpeg(smooth_image(8, 8, 0)))
    write_shards(WriteConfig(kind="folder", source=tmp_path / "images"), tmp_path / "other", num_workers=1)
    with pytest.raises(ValueError, match="other: other classes than"):
        open_training_data(_config([folders[0], tmp_path / "other"]))
