"""The loader on real tars: every sample once, exact resume on any topology, faults replaced and counted."""

import contextlib
import json
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from data_pipelines.stream.loader import Batch, DataConfig, LoaderState, TrainLoader, evaluation_batches
from data_pipelines.stream.order import Order
from data_pipelines.stream.quarantine import TooManyBadSamplesError
from data_pipelines.stream.reader import BadSampleError, ShardReader
from tests.data.stream_shards import TarShards, grey_level_shards
from tests.reference.order import epoch_batches

PLAIN: dict[str, Any] = {"crop": "centre", "flip_rate": 0.0, "eval_crop_rate": 1.0}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TarShards:
    return grey_level_shards(tmp_path_factory.mktemp("shards"), 50)


def _loader(
    shards: TarShards,
    *,
    rank: int = 0,
    world_size: int = 1,
    micro: int = 4,
    accum: int = 1,
    image_size: int = 6,
    **fields: Any,
) -> TrainLoader:
    return TrainLoader(
        shards.as_set(),
        DataConfig(**{**PLAIN, **fields}),
        image_size=image_size,
        seed=7,
        rank=rank,
        world_size=world_size,
        micro_batch_size=micro,
        grad_accum_steps=accum,
    )


def _global_batches(
    shards: TarShards, num_steps: int, state: LoaderState, *, world_size: int, micro: int, accum: int, **fields: Any
) -> list[list[int]]:
    """Sample indices of each global batch, the parts of all ranks joined."""
    parts = []
    for rank in range(world_size):
        loader = _loader(shards, rank=rank, world_size=world_size, micro=micro, accum=accum, **fields)
        steps = loader.steps(state)
        parts.append([torch.cat([batch.indices for batch in step.micro_batches]) for step in islice(steps, num_steps)])
        steps.close()
    return [torch.cat(part).tolist() for part in zip(*parts, strict=True)]


def test_rows_show_the_samples_that_they_name(shards: TarShards) -> None:
    steps = _loader(shards, workers=3).steps(LoaderState())
    for step in islice(steps, 15):
        (batch,) = step.micro_batches
        assert batch.images.dtype == torch.uint8 and batch.images.shape == (4, 3, 6, 6)
        for row, index in enumerate(batch.indices.tolist()):
            assert torch.all(batch.images[row] == index % 251)
            assert batch.labels[row] == index % 10
        assert batch.valid.all()


@pytest.mark.parametrize(("world_size", "micro", "accum"), [(1, 12, 1), (1, 3, 4), (2, 6, 1), (3, 2, 2), (12, 1, 1)])
def test_the_global_batches_do_not_depend_on_the_topology(
    shards: TarShards, world_size: int, micro: int, accum: int
) -> None:
    whole = _global_batches(shards, 10, LoaderState(), world_size=1, micro=12, accum=1)
    assert _global_batches(shards, 10, LoaderState(), world_size=world_size, micro=micro, accum=accum) == whole
    # 50 samples make four batches of 12 an epoch, and two are dropped.
    for epoch in (whole[:4], whole[4:8]):
        assert len({sample for batch in epoch for sample in batch}) == 48


@pytest.mark.parametrize("order", ["full", "block", "sequential"])
@pytest.mark.parametrize("last", ["drop", "pad"])
def test_the_loader_reads_what_the_order_says(shards: TarShards, order: str, last: str) -> None:
    config = DataConfig(order=order)  # type: ignore[arg-type]
    whole = Order.of(shards.as_set(), config, seed=7, global_batch_size=12).samples(2, np.arange(50)).tolist()
    batches = epoch_batches(whole, 12, last)
    state = LoaderState(epoch=2)
    options: dict[str, Any] = {"order": order, "last": last}
    assert _global_batches(shards, len(batches), state, world_size=3, micro=2, accum=2, **options) == batches


@pytest.mark.parametrize(("order", "stop"), [("full", 1), ("block", 3), ("full", 4), ("sequential", 5)])
def test_resume_on_another_topology_continues_the_sequence(shards: TarShards, order: str, stop: int) -> None:
    whole = _global_batches(shards, 9, LoaderState(), world_size=2, micro=6, accum=1, order=order, workers=1)
    steps = _loader(shards, world_size=2, micro=6, order=order).steps(LoaderState())
    state = list(islice(steps, stop))[-1].next_state
    text = state.to_json()
    assert len(text) < 200
    resumed = _global_batches(
        shards, 9 - stop, LoaderState.from_json(text), world_size=4, micro=1, accum=3, order=order, workers=3
    )
    assert resumed == whole[stop:]


def test_padding_fills_the_last_batch_with_the_first_samples(shards: TarShards) -> None:
    loader = _loader(shards, micro=12, last="pad")
    assert loader.steps_per_epoch == 5
    epoch = torch.cat([step.micro_batches[0].indices for step in islice(loader.steps(LoaderState()), 5)]).tolist()
    assert sorted(epoch[:50]) == list(range(50))
    assert epoch[50:] == epoch[:10]


def test_a_batch_does_not_depend_on_threads(shards: TarShards) -> None:
    options: dict[str, Any] = {"crop": "resized", "flip_rate": 0.5}
    one, four = (_loader(shards, workers=workers, **options).steps(LoaderState()) for workers in (1, 4))
    for left, right in islice(zip(one, four, strict=True), 14):
        for name in ("images", "labels", "indices", "valid", "views"):
            assert torch.equal(getattr(left.micro_batches[0], name), getattr(right.micro_batches[0], name))


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 50), (1, 7), (3, 4), (8, 8), (64, 1)])
def test_evaluation_counts_every_sample_once(shards: TarShards, world_size: int, batch_size: int) -> None:
    ranks: list[list[Batch]] = [
        list(
            evaluation_batches(
                shards.as_set(),
                DataConfig(**PLAIN),
                image_size=6,
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    rows = [
        row
        for batches in ranks
        for batch in batches
        for row in zip(batch.indices.tolist(), batch.valid.tolist(), strict=True)
    ]
    assert sorted(index for index, valid in rows if valid) == list(range(50))
    assert all(index == -1 for index, valid in rows if not valid)
    assert all(len(batch.images) == batch_size for batches in ranks for batch in batches)


def test_more_ranks_than_samples_is_an_error(shards: TarShards) -> None:
    with pytest.raises(ValueError, match=r"an epoch has 50 samples, fewer than one global batch of 64 \(64 ranks"):
        _loader(shards, world_size=64, micro=1)


def test_a_state_of_another_run_is_refused(shards: TarShards) -> None:
    loader = _loader(shards)
    good = next(iter(loader.steps(LoaderState()))).next_state
    for change in ({"seed": 8}, {"fingerprint": "00"}, {"order": "sequential"}):
        state = LoaderState(**{**json.loads(good.to_json()), **change})
        with pytest.raises(ValueError, match=f"belongs to another ({'|'.join(change)}|shards)"):
            loader.steps(state)


def test_closing_ends_the_threads(shards: TarShards) -> None:
    steps = _loader(shards, workers=3).steps(LoaderState())
    next(steps)
    assert any(thread.name.startswith("decode") for thread in threading.enumerate())
    steps.close()
    assert not any(thread.name.startswith("decode") for thread in threading.enumerate())


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[TarShards]:
    """Sample 20 has a flipped byte, sample 21 is no image."""
    shards = grey_level_shards(tmp_path / "damaged", 50)
    path = shards.folder / shards.shard_names[1]
    content = bytearray(path.read_bytes())
    content[int(shards.offset[20]) + 30] ^= 0x10
    path.write_bytes(content)
    shards.length[21] = 0
    shards.crc[21] = 0
    yield shards


def _epoch(loader: TrainLoader) -> list[Batch]:
    return [step.micro_batches[0] for step in islice(loader.steps(LoaderState()), loader.steps_per_epoch)]


def test_bad_samples_are_replaced_counted_and_recorded(damaged: TarShards, tmp_path: Path) -> None:
    file = tmp_path / "run" / "quarantine.jsonl"
    options: dict[str, Any] = {"max_bad_rate": 0.1, "quarantine_file": str(file), "micro": 10}
    loader = _loader(damaged, **options)
    indices = torch.cat([batch.indices for batch in _epoch(loader)])
    assert loader.num_bad_samples == 2
    assert len(indices) == 50 and not set(indices.tolist()) & {20, 21}
    # Threads work ahead into the next epoch, which has lines of its own.
    records = [record for record in map(json.loads, file.read_text().splitlines()) if record["epoch"] == 0]
    records.sort(key=lambda record: record["key"])
    assert [(record["shard"], record["key"]) for record in records] == [
        (damaged.shard_names[1], damaged.key(i)) for i in (20, 21)
    ]
    assert records[0]["offset"] == int(damaged.offset[20]) and "checksum" in records[0]["reason"]
    assert records[1]["reason"] == "empty image"
    again = torch.cat([batch.indices for batch in _epoch(_loader(damaged, workers=1, **options))])
    assert torch.equal(indices, again)


def test_too_many_bad_samples_stop_the_run(damaged: TarShards) -> None:
    with pytest.raises(TooManyBadSamplesError, match=r"2 bad samples in epoch 0, more than data.max_bad_rate 0.02 of"):
        _epoch(_loader(damaged, max_bad_rate=0.02, micro=10))


def test_the_share_of_bad_samples_goes_on_after_a_restart(damaged: TarShards, tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    options: dict[str, Any] = {"quarantine_file": str(file), "micro": 10, "workers": 1, "prefetch_batches": 1}
    whole = _loader(damaged, max_bad_rate=0.04, **options)
    _epoch(whole)
    assert whole.num_bad_samples == 2
    # One of the two is met before the restart, in an epoch in which one is allowed.
    first = file.read_bytes().splitlines(keepends=True)[0]
    for world_size, found_by in ((1, first), (1, first + b'{"shard": "cut'), (2, first)):
        file.write_bytes(found_by.replace(b'"world_size": 1', b'"world_size": %d' % world_size))
        with pytest.raises(TooManyBadSamplesError, match="2 bad samples in epoch 0" if world_size == 1 else "epoch 0"):
            _epoch(_loader(damaged, max_bad_rate=0.02, **options))
        assert json.loads(file.read_bytes().splitlines()[-1])["index"] in (20, 21)


def test_evaluation_stops_at_a_bad_sample_and_names_it(damaged: TarShards) -> None:
    message = rf"shard-000001.tar: sample '00000020' at offset {damaged.offset[20]}: checksum"
    with pytest.raises(BadSampleError, match=message):
        list(
            evaluation_batches(damaged.as_set(), DataConfig(**PLAIN), image_size=6, batch_size=8, rank=0, world_size=1)
        )


def test_a_lost_or_cut_shard_is_named(tmp_path: Path) -> None:
    shards = grey_level_shards(tmp_path / "cut", 32)
    path = shards.folder / shards.shard_names[1]
    path.write_bytes(path.read_bytes()[: int(shards.offset[18]) + 5])
    with ShardReader(shards.as_set()) as reader:
        assert len(reader.read(17)) == int(shards.length[17])
        with pytest.raises(BadSampleError, match="the shard ends after 5 of"):
            reader.read(18)
    path.unlink()
    with (
        ShardReader(shards.as_set()) as reader,
        pytest.raises(BadSampleError, match="cannot read the shard: No such file"),
    ):
        reader.read(18)


def test_the_reader_keeps_few_files_open(tmp_path: Path) -> None:
    shards = grey_level_shards(tmp_path / "many", 40, shard_size=2)
    with ShardReader(shards.as_set(), max_open_shards=3) as reader:
        order = np.random.default_rng(0).permutation(40)
        for index in order.tolist():
            reader.read(index)
            assert len(reader._open) <= 3


@pytest.mark.lengthy
def test_memory_does_not_grow_with_epochs(shards: TarShards) -> None:
    """Allocators and threads settle within a hundred epochs; a leak of one decoded image an epoch would go on."""
    loader = _loader(shards, micro=50, crop="resized", image_size=96)
    process, resident = psutil.Process(), []
    with contextlib.closing(loader.steps(LoaderState())) as steps:
        for _ in islice(steps, 200):
            resident.append(process.memory_info().rss)
    assert max(resident[150:]) - max(resident[50:100]) < 8 * 2**20
