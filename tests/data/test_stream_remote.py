"""Shards from a server on loopback: the same batches as from disk, faults survived or named, a cap that is kept."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.remote.cache import ShardCache, UnavailableError
from data_pipelines.remote.shard_sets import Prefetcher, RemoteShardSet, cache_of, open_data, open_training_data
from data_pipelines.shards.index import ShardSet, open_shards
from data_pipelines.stream.loader import DataConfig, LoaderState, TrainLoader, check_node_cache, evaluation_batches
from data_pipelines.stream.reader import BadSampleError, ShardReader
from data_pipelines.writing.write import WriteConfig, write_shards
from tests.servers.stream_server import Site, serve

SAMPLE = Path(__file__).parents[2] / "data_pipelines" / "sample" / "fashion_mnist"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    target = tmp_path_factory.mktemp("fashion")
    write_shards(WriteConfig(kind="idx", source=SAMPLE, split="test", shard_samples=200), target, num_workers=1)
    return open_shards(target)


@pytest.fixture
def site(local: ShardSet) -> Iterator[Site]:
    with serve(local.folder) as site:
        yield site


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(
        crop="padded", eval_crop_rate=1.0, cache_folder=str(tmp_path / "cache"), stall_s=0.5, fetch_attempts=3
    )


def _remote(site: Site, config: DataConfig) -> tuple[RemoteShardSet, ShardCache]:
    shards = open_data(site.url, config)
    assert isinstance(shards, RemoteShardSet) and shards.cache is not None
    return shards, shards.cache


def _loader(shards: ShardSet, config: DataConfig) -> TrainLoader:
    return TrainLoader(
        shards, config, image_size=28, seed=0, rank=0, world_size=1, micro_batch_size=50, grad_accum_steps=1
    )


@pytest.mark.lengthy
@pytest.mark.parametrize("order", ["full", "block"])
def test_batches_are_those_of_the_local_set(local: ShardSet, site: Site, config: DataConfig, order: str) -> None:
    config = replace(config, order=order, block_window=100)  # type: ignore[arg-type]
    shards, _ = _remote(site, config)
    assert shards.fingerprint == local.fingerprint
    steps = _loader(shards, config).steps(LoaderState())
    for got, expected in islice(zip(steps, _loader(local, config).steps(LoaderState()), strict=True), 45):
        assert torch.equal(got.micro_batches[0].images, expected.micro_batches[0].images)
        assert torch.equal(got.micro_batches[0].indices, expected.micro_batches[0].indices)
    steps.close()
    # Each shard was fetched once, although two epochs, several threads and the prefetcher wanted it.
    for name in local.shard_names:
        assert site.requests.count(name) == 1


@pytest.mark.lengthy
def test_a_small_set_is_read_by_ranges(local: ShardSet, site: Site, config: DataConfig) -> None:
    shards = open_data(site.url, replace(config, remote_reads="ranges"))
    assert cache_of(shards) is None
    site.faults[local.shard_names[1]] = ["error"]
    with ShardReader(shards) as remote, ShardReader(local) as reader:
        for index in range(150, 250):
            assert remote.read(index) == reader.read(index)
        site.faults[local.shard_names[2]] = ["missing"]
        with pytest.raises(BadSampleError, match="not found"):
            remote.read(450)
    batch = next(_loader(shards, config).steps(LoaderState())).micro_batches[0]
    expected = next(_loader(local, config).steps(LoaderState())).micro_batches[0]
    assert torch.equal(batch.images, expected.images)
    assert not list(shards.folder.glob("*.tar"))


def test_evaluation_reads_a_remote_set_once(local: ShardSet, site: Site, config: DataConfig) -> None:
    shards, _ = _remote(site, config)
    batches = evaluation_batches(shards, config, image_size=28, batch_size=128, rank=0, world_size=1)
    assert sum(int(batch.valid.sum()) for batch in batches) == 2000


@pytest.mark.parametrize("fault", ["error", "reset", "short", "stall"])
def test_a_passing_fault_is_retried_and_reported(
    site: Site, config: DataConfig, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    shards, cache = _remote(site, config)
    name = shards.shard_names[3]
    site.faults[name] = [fault, fault]
    with cache.lease(3) as path:
        assert path.stat().st_size == shards.manifest.shards[3].bytes
    # aiohttp itself repeats a request once when the connection was reset.
    assert f"attempt 1 of 3: {site.url}/{name}" in caplog.text


def test_a_server_that_stays_away_stops_the_run(site: Site, config: DataConfig) -> None:
    shards, _ = _remote(site, config)
    for name in shards.shard_names:
        site.faults[name] = ["error"] * 1000
    steps = _loader(shards, replace(config, fetch_attempts=1)).steps(LoaderState())
    with pytest.raises(UnavailableError, match=rf"{site.url}/.*\.tar: .*500.*given up after 3 attempts"):
        next(steps)


def test_a_shard_that_disappears_is_bad_samples(site: Site, config: DataConfig, tmp_path: Path) -> None:
    shards, _ = _remote(site, config)
    site.faults[shards.shard_names[2]] = ["missing"] * 1000
    with ShardReader(shards) as reader, pytest.raises(BadSampleError, match="not found"):
        reader.read(450)
    file = tmp_path / "quarantine.jsonl"
    steps = _loader(shards, replace(config, max_bad_rate=0.2, quarantine_file=str(file))).steps(LoaderState())
    for step in islice(steps, 10):
        assert not ((step.micro_batches[0].indices >= 400) & (step.micro_batches[0].indices < 600)).any()
    steps.close()
    assert {json.loads(line)["shard"] for line in file.read_text().splitlines()} == {shards.shard_names[2]}


def test_a_changed_shard_never_enters_the_cache(
    local: ShardSet, config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in local.folder.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    content = bytearray((copy / local.shard_names[1]).read_bytes())
    content[5000] ^= 1
    with serve(copy) as site:
        shards, cache = _remote(site, config)
        (copy / local.shard_names[1]).write_bytes(content)
        with ShardReader(shards) as reader, pytest.raises(BadSampleError, match="has changed: its hash"):
            reader.read(250)
        assert not cache.has(1) and not list(shards.folder.glob("*.part"))
        # Mended on the server, it is good again after a while.
        content[5000] ^= 1
        (copy / local.shard_names[1]).write_bytes(content)
        with ShardReader(shards) as reader:
            with pytest.raises(BadSampleError, match="has changed: its hash"):
                reader.read(250)
            monkeypatch.setattr("data_pipelines.remote.cache._CHANGED_S", 0.0)
            assert reader.read(250)


@pytest.mark.lengthy
@pytest.mark.parametrize("what", ["missing", "changed"])
def test_a_shard_that_goes_wrong_on_the_server_during_the_epoch(
    local: ShardSet, config: DataConfig, tmp_path: Path, what: str
) -> None:
    copy, name, file = tmp_path / "copy", local.shard_names[8], tmp_path / "quarantine.jsonl"
    copy.mkdir()
    for path in local.folder.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    changes: dict[str, Any] = {"order": "sequential", "max_bad_rate": 0.2, "quarantine_file": str(file)}
    config = replace(config, fetch_ahead_steps=1, prefetch_batches=1, **changes)
    with serve(copy) as site:
        shards, _ = _remote(site, config)
        steps = _loader(shards, config).steps(LoaderState())
        seen = [next(steps).micro_batches[0].indices.tolist()]
        content = (copy / name).read_bytes()
        (copy / name).unlink()
        if what == "changed":
            (copy / name).write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
        seen += [step.micro_batches[0].indices.tolist() for step in islice(steps, 39)]
        steps.close()
        # All samples of a shard that has changed do not fetch it again and again.
        assert what == "missing" or site.requests.count(name) == 1
    assert [len(batch) for batch in seen] == [50] * 40
    assert not {index for batch in seen for index in batch} & set(range(1600, 1800))
    records = [record for record in map(json.loads, file.read_text().splitlines()) if record["epoch"] == 0]
    assert {(record["shard"], record["index"]) for record in records} == {(name, i) for i in range(1600, 1800)}
    assert all(
        ("not found" if what == "missing" else "has changed: its hash") in record["reason"] for record in records
    )


def test_the_cap_is_kept_and_the_longest_unused_shard_goes(
    site: Site, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipelines.remote.cache._ROOM_TIMEOUT_S", 0.1)
    shards, _ = _remote(site, config)
    size = shards.manifest.shards[0].bytes
    shards, cache = _remote(site, replace(config, cache_gib=3.5 * size / 2**30))
    for shard in (0, 1, 2, 0, 3):
        with cache.lease(shard):
            assert sum(path.stat().st_size for path in shards.folder.glob("*.tar*")) <= 3.5 * size
    assert [cache.has(shard) for shard in range(4)] == [True, False, True, True]
    with cache.lease(0), cache.lease(2), cache.lease(3):
        with pytest.raises(UnavailableError, match=r"bytes are in use.*raise data\.cache_gib"), cache.lease(4):
            pass
        assert cache.has(0) and cache.has(2) and cache.has(3)


def test_a_cache_that_is_too_small_is_refused_at_the_start(site: Site, config: DataConfig) -> None:
    shards, _ = _remote(site, config)
    size = shards.manifest.shards[0].bytes
    with pytest.raises(ValueError, match="cannot hold a shard"):
        _remote(site, replace(config, cache_gib=0.5 * size / 2**30))
    small = replace(config, cache_gib=2.5 * size / 2**30)
    with pytest.raises(ValueError, match=r"the next 64 steps of rank 0 of 1 read shards of .*raise data\.cache_gib"):
        next(_loader(_remote(site, small)[0], small).steps(LoaderState()))
    block = replace(small, order="block", block_window=10, fetch_ahead_steps=1, prefetch_batches=1)
    loader = TrainLoader(
        _remote(site, block)[0],
        block,
        image_size=28,
        seed=0,
        rank=0,
        world_size=1,
        micro_batch_size=25,
        grad_accum_steps=1,
    )
    seen = torch.cat([step.micro_batches[0].indices for step in islice(loader.steps(LoaderState()), 80)])
    assert sorted(seen.tolist()) == list(range(2000))


def test_the_window_of_all_ranks_of_a_node_must_fit_its_cache(site: Site, config: DataConfig) -> None:
    """Two steps of a rank of 8 read few shards, those of 8 ranks on one node nearly all."""
    shards, _ = _remote(site, config)
    narrow = replace(config, fetch_ahead_steps=2, cache_gib=6.5 * shards.manifest.shards[0].bytes / 2**30)
    shards, _ = _remote(site, narrow)
    check_node_cache(shards, narrow, seed=0, global_batch_size=16, num_nodes=8)
    with pytest.raises(ValueError, match=r"the next 2 steps of rank 0 of 1 read shards of .*raise data\.cache_gib"):
        check_node_cache(shards, narrow, seed=0, global_batch_size=16, num_nodes=1)


def test_a_stuck_shard_is_named_while_it_is_waited_for(
    local: ShardSet, site: Site, config: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    site.faults[local.shard_names[0]] = ["stall"]
    shards = open_data(site.url, replace(config, stall_s=5.0))
    steps = _loader(shards, replace(config, stall_s=0.4, workers=1, order="sequential")).steps(LoaderState())
    next(steps)
    steps.close()
    message = rf"waiting for the next batch for 0 s now; in progress: {site.url}/shard-\d+\.tar \(for 0 s\)"
    assert re.search(message, caplog.text)


@pytest.mark.lengthy
def test_a_mixture_of_remote_and_local_sets_is_that_of_local_ones(
    local: ShardSet, site: Site, config: DataConfig, tmp_path: Path
) -> None:
    source = WriteConfig(kind="idx", source=SAMPLE, split="train", shard_samples=500)
    write_shards(source, tmp_path / "train", num_workers=1)
    weights = {"mixture_weights": (1.0, 2.0), "train_folder": str(tmp_path / "train"), "order": "block"}
    options: dict[str, Any] = {**weights, "block_window": 300}
    mixed = [
        (settings, open_training_data(settings))
        for settings in (
            replace(config, mixture_folders=(place,), **options) for place in (str(local.folder), site.url)
        )
    ]
    steps = [_loader(shards, settings).steps(LoaderState()) for settings, shards in mixed]
    for expected, got in islice(zip(*steps, strict=True), 10):
        assert torch.equal(got.micro_batches[0].images, expected.micro_batches[0].images)
        assert torch.equal(got.micro_batches[0].indices, expected.micro_batches[0].indices)
    for iterator in steps:
        iterator.close()
    assert site.requests.count(local.shard_names[0]) <= 1


@pytest.mark.slow
def test_worker_processes_read_a_remote_set(local: ShardSet, site: Site, config: DataConfig) -> None:
    config = replace(config, worker_kind="processes", workers=2)
    steps = _loader(_remote(site, config)[0], config).steps(LoaderState())
    expected = _loader(local, replace(config, worker_kind="threads")).steps(LoaderState())
    for left, right in islice(zip(steps, expected, strict=True), 5):
        assert torch.equal(left.micro_batches[0].images, right.micro_batches[0].images)
    steps.close()


def test_many_threads_fetch_a_shard_once(site: Site, config: DataConfig) -> None:
    shards, cache = _remote(site, config)
    threads = [threading.Thread(target=lambda: cache.lease(5).__enter__()) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert site.requests.count(shards.shard_names[5]) == 1


SHARING = """
import random, sys
from data_pipelines.config import DataConfig
from data_pipelines.shards.hashes import hash_bytes
from data_pipelines.remote.shard_sets import open_data

url, folder, gib, seed = sys.argv[1:]
shards = open_data(url, DataConfig(cache_folder=folder, cache_gib=float(gib)))
random.seed(int(seed))
for _ in range(60):
    shard = random.randrange(shards.num_shards)
    with shards.cache.lease(shard) as path:
        data = path.read_bytes()
        with shards.cache._room():
            used = sum(file.stat().st_size for file in shards.folder.glob("*.tar*") if file.suffix != ".lock")
    assert hash_bytes(data, "xxh3_128") == shards.manifest.shards[shard].hash
    assert used <= shards.cache.max_bytes
"""


@pytest.mark.multi_process
def test_jobs_share_a_cache_that_is_smaller_than_the_set(site: Site, config: DataConfig) -> None:
    shards, _ = _remote(site, config)
    gib = 4.5 * shards.manifest.shards[0].bytes / 2**30
    command = [sys.executable, "-W", "ignore", "-c", SHARING, site.url, str(config.cache_folder), str(gib)]
    root = Path(__file__).parents[2]
    jobs = [subprocess.Popen([*command, str(seed)], cwd=root, stderr=subprocess.PIPE, text=True) for seed in range(3)]
    errors = [job.communicate()[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], errors
    fetched = sum(site.requests.count(name) for name in shards.shard_names)
    assert shards.num_shards <= fetched < 180


def test_the_prefetcher_fetches_what_is_wanted(site: Site, config: DataConfig) -> None:
    shards, cache = _remote(site, config)
    with Prefetcher(shards, num_threads=2) as prefetcher:
        prefetcher.want([1, 2, 1])
        for future in list(prefetcher._running.values()):
            future.result()
    assert cache.has(1) and cache.has(2) and not cache.has(3)


KILLED = """
import sys, time
from pathlib import Path
from data_pipelines.remote.cache import ShardCache
from data_pipelines.shards.manifest import read_manifest

def download(name, target, *, num_bytes, file_hash):
    print("fetching", flush=True)
    time.sleep(60)

folder = Path(sys.argv[1])
with ShardCache(download, folder, read_manifest(folder), max_bytes=1 << 30).lease(0):
    pass
"""


@pytest.mark.multi_process
def test_a_killed_job_leaves_nothing_in_the_way(
    site: Site, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipelines.remote.cache._ROOM_TIMEOUT_S", 0.1)
    shards, cache = _remote(site, config)
    command = [sys.executable, "-c", KILLED, str(shards.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as job:
        assert job.stdout is not None and job.stdout.readline() == "fetching\n"
        os.kill(job.pid, signal.SIGKILL)
    assert list(shards.folder.glob("*.part"))
    # Room is made from what the job was writing, and the shard is fetched anew.
    size = shards.manifest.shards[0].bytes
    _, small = _remote(site, replace(config, cache_gib=1.5 * size / 2**30))
    with small.lease(1), pytest.raises(OSError, match="in use"), cache.lease(1), small.lease(2):
        pass
    with cache.lease(0) as path:
        assert path.stat().st_size == size
    assert not list(shards.folder.glob("*.part"))


def test_a_full_disk_is_named_and_leaves_no_part(
    site: Site, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, cache = _remote(site, config)

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UnavailableError, match="No space left on device"), cache.lease(0):
        pass
    assert not list(shards.folder.glob("*.part"))


@pytest.mark.parametrize(
    "location", ["pipe:cat x", "pipe://cat", "zip::http://x/y", "file://a::memory://b", "ftp://x/y"]
)
def test_locations_that_run_or_wrap_something_are_refused(location: str, config: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"a pipe would start|expected a folder or a URL of"):
        open_data(location, config)


@pytest.mark.parametrize(
    ("scheme", "package"), [("https", "aiohttp"), ("s3", "s3fs"), ("gs", "gcsfs"), ("hf", "huggingface_hub")]
)
def test_the_package_that_a_scheme_needs_is_named(
    scheme: str, package: str, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{scheme}://a/b: {scheme}:// needs {package} .*-m pip install .*{package}$"):
        open_data(f"{scheme}://a/b", config)


def test_a_local_folder_has_no_cache(local: ShardSet, config: DataConfig) -> None:
    shards = open_data(local.folder, config)
    assert cache_of(shards) is None and shards.fingerprint == local.fingerprint


def test_a_missing_set_is_named(site: Site, config: DataConfig) -> None:
    with pytest.raises(FileNotFoundError, match=r"/nothing/manifest\.json: not found"):
        open_data(f"{site.url}/nothing", config)
