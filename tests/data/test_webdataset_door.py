"""People who have webdataset: our order in their pipelines, and their tars where they lie, as one index reads them."""

import hashlib
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from PIL import Image

from data_pipelines.config import DataConfig
from data_pipelines.remote.shard_sets import open_data
from data_pipelines.shards.index import ShardSet, open_shards
from data_pipelines.shards.mixture import mix_shards
from data_pipelines.stream.loader import TrainLoader
from data_pipelines.stream.reader import BadSampleError
from data_pipelines.stream.webdataset_door import to_webdataset
from sret_scale.cli import main
from sret_scale.launch.doctor.inputs import check_shards
from tests.data.shard_sources import jpeg, make_tar
from tests.forked import sret_scale_forked
from tests.servers.stream_server import serve
from tests.tiny import tiny_config, tiny_shards, write_config


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars of 10 images each as webdataset writes them, read-only."""
    folder = tmp_path_factory.mktemp("tars") / "theirs"
    folder.mkdir()
    for shard in range(3):
        with webdataset.TarWriter(str(folder / f"train-{shard:06d}.tar")) as writer:
            for number in range(10):
                key = f"{shard}{number}"
                writer.write({"__key__": key, "jpg": jpeg(int(key)), "cls": number % 4, "json": {"key": key}})
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555)
    return folder


@pytest.fixture(scope="module")
def shards(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    output = tmp_path_factory.mktemp("index") / "train"
    assert main(["shards", "index", f"{tars}/train-{{000000..000002}}.tar", "--output", str(output)]) == 0
    return open_shards(output)


@pytest.fixture(scope="module")
def streamed(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of a set whose tars are at a URL."""
    output = tmp_path_factory.mktemp("streamed") / "train"
    pattern = f"file://{tars}/train-{{000000..000002}}.tar"
    assert main(["shards", "index", pattern, "--output", str(output), "--workers", "1"]) == 0
    return output


def _keys(batches: Any, count: int) -> list[list[str]]:
    return [list(keys) for keys, *_ in islice(batches, count)]


def _pipeline(shards: ShardSet, **options: Any) -> webdataset.DataPipeline:
    stages = (
        webdataset.decode("pil"),
        webdataset.to_tuple("__key__", "jpg", "cls", "__state__"),
        webdataset.batched(4),
    )
    return to_webdataset(shards, batch_size=4, seed=3, **options).compose(*stages)


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.multi_process)])
def test_a_pipeline_has_the_order_of_our_loader_and_goes_on_exactly(
    shards: ShardSet, world_size: int, num_workers: int
) -> None:
    """Through webdataset's own stages and WebLoader; over the end of an epoch."""
    for rank in range(world_size):
        own = TrainLoader(shards, micro_batch_size=4, seed=3, rank=rank, world_size=world_size, image_size=16)
        expected = [[shards.key(index) for index in batch.indices.tolist()] for batch in islice(own, 9)]
        place = {"rank": rank, "world_size": world_size}
        whole = webdataset.WebLoader(_pipeline(shards, **place), batch_size=None, num_workers=num_workers)
        seen = list(islice(whole, 9))
        assert [list(keys) for keys, *_ in seen] == expected
        _, images, labels, states = seen[3]
        assert all(isinstance(image, Image.Image) for image in images)
        assert [int(key[1]) % 4 for key in seen[3][0]] == list(labels)
        rest = webdataset.WebLoader(
            _pipeline(shards, **place, state=states[-1]), batch_size=None, num_workers=num_workers
        )
        assert _keys(rest, 5) == expected[4:]


def test_our_decoding_gives_the_views_of_training(shards: ShardSet) -> None:
    own = next(iter(TrainLoader(shards, micro_batch_size=4, seed=3, image_size=16)))
    stages = (webdataset.to_tuple("image", "cls"), webdataset.batched(4))
    images, labels = next(iter(to_webdataset(shards, batch_size=4, seed=3, image_size=16).compose(*stages)))
    assert torch.equal(torch.as_tensor(images), own.images) and list(labels) == own.labels.tolist()


def test_changed_bytes_and_a_foreign_state_are_refused(
    shards: ShardSet, tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tars.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert main(["shards", "index", str(copy), "--output", str(tmp_path / "index")]) == 0
    capsys.readouterr()
    assert main(["shards", "info", str(tmp_path / "index")]) == 0
    assert f"tars at      {copy}\n" in capsys.readouterr().out
    own = open_shards(tmp_path / "index")
    assert own.fingerprint == shards.fingerprint and own.folder == copy
    target = copy / own.shard_names[int(own.shard_of[7])]
    data = bytearray(target.read_bytes())
    data[int(own.offset[7]) + 40] ^= 1
    target.write_bytes(bytes(data))
    with pytest.raises(BadSampleError, match="the bytes have changed"):
        list(islice(to_webdataset(own, batch_size=4), 30))
    # Of the sound copy: which sample comes first depends on the time at which the tars were written.
    state = next(iter(to_webdataset(shards, batch_size=4)))["__state__"]
    with pytest.raises(ValueError, match="belongs to another seed"):
        to_webdataset(own, batch_size=4, seed=1, state=state)


def test_tars_on_a_server_are_read_once_and_streamed_from_there(
    tars: Path, shards: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(tars) as site:
        pattern = site.url + "/train-{000000..000002}.tar"
        output = tmp_path / "index"
        assert main(["shards", "index", pattern, "--output", str(output), "--workers", "1"]) == 0
        assert "30 samples of 4 classes in 3 shards" in capsys.readouterr().out
        assert sorted(site.requests) == [f"train-{number:06d}.tar" for number in range(3)]
        assert sorted(path.name for path in output.iterdir()) == ["index.npz", "manifest.json"]
        remote = open_data(output, DataConfig(cache_folder=str(tmp_path / "cache")))
        assert remote.fingerprint == shards.fingerprint
        batches = [iter(TrainLoader(one, micro_batch_size=4, image_size=16)) for one in (remote, shards)]
        for theirs, ours in islice(zip(*batches, strict=True), 8):
            assert torch.equal(theirs.images, ours.images)
        # A tar that has changed there is not taken for the one that was indexed.
        site.folder = tmp_path / "other"
        site.folder.mkdir()
        for path in tars.iterdir():
            (site.folder / path.name).write_bytes(path.read_bytes()[:-512] + b"x" * 512)
        changed = open_data(
            output, DataConfig(cache_folder=str(tmp_path / "empty"), max_bad_rate=0.0, fetch_attempts=1)
        )
        with pytest.raises((OSError, ValueError), match="has changed"):
            next(iter(TrainLoader(changed, micro_batch_size=4, image_size=16)))


def test_a_sample_names_the_tar_or_the_url_it_came_from(shards: ShardSet, streamed: Path, tmp_path: Path) -> None:
    remote = open_data(streamed, DataConfig(cache_folder=str(tmp_path / "cache")))
    ours = {f"{shards.folder}/{name}" for name in shards.shard_names}
    theirs = {f"file://{shards.folder}/{name}" for name in shards.shard_names}
    for one, expected in ((shards, ours), (remote, theirs), (mix_shards([shards, remote]), ours | theirs)):
        assert {sample["__url__"] for sample in islice(to_webdataset(one, batch_size=4), one.num_samples)} == expected


@pytest.mark.parametrize(
    "command",
    [
        ["shards", "verify", "SET"],
        ["shards", "repair", "SET", "new"],
        ["shards", "head", "SET", "new"],
        ["shards", "sidecars", "SET"],
        ["labels", "write", "SET", "new", "--teacher", "run:nowhere", "--views", "1", "--top-k", "1"],
    ],
)
def test_commands_that_need_tars_in_a_folder_say_so_of_those_on_a_server(
    command: list[str],
    streamed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = _digests(streamed)
    assert main([str(streamed) if word == "SET" else word for word in command]) == 2
    said = capsys.readouterr()
    assert "its tars lie in file://" in said.err and "damaged" not in said.out + said.err
    assert _digests(streamed) == before and not list(tmp_path.iterdir())


def test_the_index_of_tars_on_a_server_is_enough_for_info_and_doctor(streamed: Path) -> None:
    assert main(["shards", "info", str(streamed)]) == 0
    assert [finding.state for finding in check_shards([streamed])] == ["ok"]


@pytest.mark.multi_process
def test_train_takes_tars_where_they_lie(tmp_path: Path) -> None:
    theirs = tiny_shards(tmp_path / "theirs")
    for split in ("train", "test"):
        names = (theirs / split / "manifest.json").read_text().partition('"class_names": [')[2].partition("]")[0]
        for part in ("manifest.json", "index.npz"):
            (theirs / split / part).unlink()
        (theirs / split / "classes.txt").write_text("\n".join(name.strip(' "') for name in names.split(",")))
        before = _digests(theirs / split)
        pattern = f"{theirs}/{split}/shard-{{000000..000002}}.tar"
        assert main(["shards", "index", pattern, "--output", str(tmp_path / "index" / split)]) == 0
        assert _digests(theirs / split) == before
    config = write_config(tmp_path / "tiny.yaml", tiny_config(tmp_path / "index"), total_images=128)
    ended = sret_scale_forked("train", config, "--run", tmp_path / "run", "--ranks", "1", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pipe:curl -s https://host/{0..3}.tar", "a pipe would start whatever program a text names"),
        ("ftp://host/{0..3}.tar", "expected a folder or a URL of"),
        ("nowhere/{0..3}.tar", "nowhere/0.tar: No such file"),
        ("{a,b}/0.tar", "expected different tars of one folder, got 2 of 2 folders"),
        ("nowhere/{0..3}.zip", "expected the name of a .tar file"),
    ],
)
def test_what_cannot_be_indexed_is_refused_with_its_reason(
    source: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["shards", "index", source, "--output", "out", "--workers", "1"]) == 2
    assert message in capsys.readouterr().err
    if source.startswith("pipe"):
        with pytest.raises(ValueError, match=message):
            open_data("pipe:cat x", DataConfig())


@pytest.mark.parametrize(
    "source", ["{at}/a-{{0..1}}.tar", "file://{at}/a-{{0..1}}.tar", "{at}/a-0.tar", "{at}/nowhere"]
)
def test_only_a_folder_is_indexed_where_it_is(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        make_tar(tmp_path / f"a-{number}.tar", {f"{number}.jpg": jpeg(number), f"{number}.cls": b"0"})
    before = _digests(tmp_path)
    assert main(["shards", "index", source.format(at=tmp_path), "--workers", "1"]) == 2
    assert "expected an existing folder of tars" in (said := capsys.readouterr().err) and "--output FOLDER" in said
    assert _digests(tmp_path) == before
