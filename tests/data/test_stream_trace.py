"""`trace_keys` says what the loader reads."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.stream.loader import DataConfig, LoaderState, TrainLoader
from data_pipelines.stream.order import Order
from data_pipelines.stream.trace import trace_keys
from tests.data.stream_shards import TarShards, grey_level_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TarShards:
    return grey_level_shards(tmp_path_factory.mktemp("shards"), 90, shard_size=9)


def _trace(
    shards: TarShards, *, order: str = "full", last: str = "drop", global_batch_size: int = 12, **changes: int
) -> list[str]:
    sequence = Order.of(shards, DataConfig(order=order), seed=3, global_batch_size=global_batch_size)  # type: ignore[arg-type]
    options = {"world_size": 1, "rank": 0, "epoch": 2, **changes}
    return list(trace_keys(shards, sequence, last=last, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["full", "block", "sequential"])
@pytest.mark.parametrize("last", ["drop", "pad"])
def test_the_loader_reads_what_the_trace_says(shards: TarShards, order: str, last: str) -> None:
    options: dict[str, Any] = {"order": order, "last": last, "eval_crop_rate": 1.0}
    for rank in range(3):
        loader = TrainLoader(
            shards.as_set(),
            DataConfig(**options),
            image_size=6,
            seed=3,
            rank=rank,
            world_size=3,
            micro_batch_size=2,
            grad_accum_steps=2,
        )
        steps = islice(loader.steps(LoaderState(epoch=2)), loader.steps_per_epoch)
        read = torch.cat([batch.indices for step in steps for batch in step.micro_batches])
        traced = _trace(shards, order=order, last=last, world_size=3, rank=rank)
        assert [shards.key(index) for index in read.tolist()] == traced


@given(
    world_size=st.sampled_from([1, 2, 3, 5, 8, 64]),
    per_rank=st.integers(1, 3),
    stop=st.integers(0, 20),
    order=st.sampled_from(["full", "block"]),
)
@settings(max_examples=40, deadline=None)
def test_ranks_share_each_global_batch_in_contiguous_parts(
    shards: TarShards, world_size: int, per_rank: int, stop: int, order: str
) -> None:
    global_batch_size = world_size * per_rank
    if global_batch_size > 90:
        return
    whole = _trace(shards, order=order, global_batch_size=global_batch_size)
    assert len(whole) == len(set(whole)) == 90 // global_batch_size * global_batch_size
    position = min(stop, 90 // global_batch_size) * global_batch_size
    parts = [
        _trace(
            shards,
            order=order,
            global_batch_size=global_batch_size,
            world_size=world_size,
            rank=rank,
            position=position,
        )
        for rank in range(world_size)
    ]
    assert len({len(part) for part in parts}) == 1
    joined = []
    for start in range(0, len(parts[0]), per_rank):
        joined += [key for part in parts for key in part[start : start + per_rank]]
    assert joined == whole[position:]


def test_padding_and_count(shards: TarShards) -> None:
    padded = _trace(shards, last="pad", global_batch_size=40)
    assert len(padded) == 120 and sorted(padded[:90]) == sorted(shards.key(i) for i in range(90))
    assert padded[90:] == padded[:30]
    assert _trace(shards, count=17) == _trace(shards)[:17]
    assert _trace(shards, count=0) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank 2: expected 0 to 1"),
        ({"world_size": 5}, "global batch 12: 5 ranks cannot share it equally"),
        ({"global_batch_size": 91}, "an epoch has 90 samples, fewer than a global batch of 91"),
        ({"world_size": 0}, "world size 0: expected 1 or more"),
        ({"position": -1}, "position -1: expected 0 or more"),
    ],
)
def test_impossible_questions_are_named(shards: TarShards, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _trace(shards, **changes)


def test_the_trace_needs_no_pixels(tmp_path: Path) -> None:
    shards = grey_level_shards(tmp_path, 20)
    for name in shards.shard_names:
        (tmp_path / name).unlink()
    assert len(_trace(shards)) == 12
