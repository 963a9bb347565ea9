"""A user's transform, in threads and in processes: the same rows, resume and errors; what fails is named."""

import gc
import json
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from data_pipelines.config import DataConfig
from data_pipelines.image.user_transform import TransformError
from data_pipelines.image.view import view_settings
from data_pipelines.stream.loader import Batch, LoaderState, TrainLoader
from data_pipelines.stream.quarantine import TooManyBadSamplesError
from data_pipelines.user_functions import function_of_user
from tests.data.stream_shards import TarShards, grey_level_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TarShards:
    """Sample 20 has a flipped byte."""
    shards = grey_level_shards(tmp_path_factory.mktemp("shards"), 50)
    path = shards.folder / shards.shard_names[1]
    content = bytearray(path.read_bytes())
    content[int(shards.offset[24]) + 30] ^= 0x10
    path.write_bytes(content)
    return shards


@contextmanager
def _batches(
    shards: TarShards, state: LoaderState | None = None, **fields: Any
) -> Iterator[Iterator[tuple[Batch, LoaderState]]]:
    options: dict[str, Any] = {"crop": "centre", "transform": "tests.data.stream_transforms:seeded_noise", **fields}
    loader = TrainLoader(
        shards,  # type: ignore[arg-type]
        DataConfig(**{"eval_crop_rate": 1.0, "max_bad_rate": 0.1, "num_repeats": 2, **options}),
        image_size=6,
        seed=7,
        rank=0,
        world_size=1,
        micro_batch_size=10,
        grad_accum_steps=2,
    )
    steps = loader.steps(state or LoaderState())
    try:
        yield ((batch, step.next_state) for step in steps for batch in step.micro_batches)
    finally:
        steps.close()


def _workers() -> set[str]:
    return {child.name for child in multiprocessing.active_children()}


def _same(left: Batch, right: Batch) -> bool:
    names = ("images", "labels", "indices", "valid", "views", "view_numbers")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


@pytest.mark.multi_process
def test_processes_give_the_batches_of_threads_and_resume(shards: TarShards, tmp_path: Path) -> None:
    files = [tmp_path / "threads.jsonl", tmp_path / "processes.jsonl"]
    with _batches(shards, workers=1, quarantine_file=str(files[0])) as threads:
        expected = list(islice(threads, 14))
    options: dict[str, Any] = {"worker_kind": "processes", "workers": 2}
    with _batches(shards, quarantine_file=str(files[1]), **options) as processes:
        got = list(islice(processes, 14))
        assert len(_workers()) == 2
    assert not _workers()
    for (left, left_state), (right, right_state) in zip(expected, got, strict=True):
        assert _same(left, right) and left_state == right_state
    with _batches(shards, got[3][1], worker_kind="processes", workers=1) as resumed:
        for (left, _), (right, _) in zip(expected[4:8], resumed, strict=False):
            assert _same(left, right)
    # Noise was added, and it is the view's: the two views of an image differ, and threads do not matter.
    assert len({tuple(batch.images[:, 0, 0, 0].tolist()) for batch, _ in expected}) == 14
    records = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert records[0][0] == records[1][0] and records[0][0]["key"] == "00000024"


@pytest.mark.multi_process
def test_closed_workers_are_forgotten(shards: TarShards, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses a later iterator at an address that it still knows."""
    known: dict[int, tuple[int, ...]] = {}
    monkeypatch.setattr(signal_handling, "_set_worker_pids", known.__setitem__)
    monkeypatch.setattr(signal_handling, "_remove_worker_pids", known.pop)
    with _batches(shards, worker_kind="processes", workers=1) as batches:
        next(batches)
        assert len(known) == 1
    assert not known


@pytest.mark.multi_process
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_errors_are_the_same_and_name_the_sample(shards: TarShards, kind: str) -> None:
    name = "tests.data.stream_transforms:fails_on_grey_20"
    message = rf"{name}: .*shard-000001\.tar: sample '00000020' at offset \d+: RuntimeError: no grey of 20"
    with (
        _batches(shards, transform=name, worker_kind=kind, workers=1) as batches,
        pytest.raises(TransformError, match=message),
    ):
        list(islice(batches, 10))
    assert not _workers()


@pytest.mark.slow
def test_too_many_bad_samples_stop_processes_too(shards: TarShards) -> None:
    with (
        _batches(shards, max_bad_rate=0.0, worker_kind="processes", workers=1) as batches,
        pytest.raises(TooManyBadSamplesError, match=r"1 bad samples in epoch 0, more than data\.max_bad_rate 0 of"),
    ):
        list(islice(batches, 10))


@pytest.mark.multi_process
def test_a_worker_that_dies_is_named(shards: TarShards) -> None:
    name = "tests.data.stream_transforms:dies_on_grey_20"
    place = r"at .*shard-000001\.tar: sample '00000020' at offset \d+"
    message = rf"data worker \(process \d+\), {place}: the process, which reads.*was killed by SIGKILL; out of memory\?"
    with (
        _batches(shards, transform=name, worker_kind="processes", workers=1) as batches,
        pytest.raises(OSError, match=message),
    ):
        list(islice(batches, 10))
    assert not _workers()


@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_waits_is_named(shards: TarShards) -> None:
    with _batches(shards, worker_kind="processes", workers=1, prefetch_batches=1) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        worker.kill()
        worker.join()
        with pytest.raises(
            OSError, match=r"data worker \(process \d+\), .* was killed by SIGKILL; out of memory"
        ) as raised:
            list(islice(batches, 10))
    # The error keeps torch's iterator alive. Its clean-up would wait for a lock that a killed process may hold.
    left = [one for one in gc.get_objects() if type(one) is _MultiProcessingDataLoaderIter]
    assert raised.tb is not None and left and all(one._shutdown for one in left)


def test_what_is_no_transform_is_named(shards: TarShards) -> None:
    with pytest.raises(ValueError, match=r"data\.transform: expected module:function, or null, got 'os.system'"):
        DataConfig(transform="os.system")
    for name, reason in (
        ("no_such_module_here:f", "cannot import no_such_module_here: No module .* on PYTHONPATH or in"),
        ("tests.data.stream_transforms:nothing", "tests.data.stream_transforms has no function 'nothing'"),
    ):
        with pytest.raises(ValueError, match=reason):
            function_of_user(name, "data.transform")
    name = "tests.data.stream_transforms:returns_floats"
    with (
        _batches(shards, transform=name) as batches,
        pytest.raises(TransformError, match=r"expected uint8 \(3, 6, 6\), got float64 \(3, 6, 6\)"),
    ):
        next(batches)


def test_a_transform_belongs_to_the_view() -> None:
    """Stored soft labels are of views: those of another transform must not be taken for them."""
    assert view_settings(DataConfig(transform="a:b")) != view_settings(DataConfig())
