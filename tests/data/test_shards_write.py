"""Writing shards from the sample that ships: format, determinism, restart."""

import filecmp
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from data_pipelines.image.map_png import encode_png
from data_pipelines.shards.index import WORK_FOLDER, open_shards
from data_pipelines.sources.idx import read_idx
from data_pipelines.writing import workers
from data_pipelines.writing.prepare import ImageOptions
from data_pipelines.writing.shard_plan import Plan
from data_pipelines.writing.shard_writer import write_shard
from data_pipelines.writing.write import WriteConfig, write_shards

# webdataset leaves the closing of its files to the garbage collector.
UNCLOSED = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

SAMPLE = Path(__file__).parents[2] / "data_pipelines" / "sample" / "fashion_mnist"
TEST_SPLIT = WriteConfig(kind="idx", source=SAMPLE, split="test", shard_samples=300)


def assert_same_files(left: Path, right: Path) -> None:
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    assert filecmp.cmpfiles(left, right, names, shallow=False) == (names, [], [])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "test"
    write_shards(TEST_SPLIT, folder)
    return folder


@UNCLOSED
def test_webdataset_reads_what_the_index_says(written: Path) -> None:
    shards = open_shards(written)
    assert (shards.num_samples, shards.num_classes, shards.num_shards) == (2000, 10, 7)
    urls = [str(written / name) for name in shards.shard_names]
    count = 0
    for index, sample in enumerate(wds.WebDataset(urls, shardshuffle=False)):
        assert sample["__key__"] == shards.key(index)
        assert int(sample["cls"]) == shards.label[index]
        assert json.loads(sample["json"])["class"] == shards.class_names[shards.label[index]]
        with (written / shards.shard_names[shards.shard_of[index]]).open("rb") as file:
            file.seek(int(shards.offset[index]))
            assert file.read(int(shards.length[index])) == sample["png"]
        count += 1
    assert count == 2000


def test_every_image_of_the_source_is_there_once(written: Path) -> None:
    shards = open_shards(written)
    images_NHW = read_idx(SAMPLE / "t10k-images-idx3-ubyte.gz")
    labels = read_idx(SAMPLE / "t10k-labels-idx1-ubyte.gz")
    rows = [int(shards.key(index).removeprefix("test-")) for index in range(shards.num_samples)]
    assert sorted(rows) == list(range(2000)) and rows != sorted(rows)
    assert np.array_equal(shards.label, labels[rows])
    data = (written / shards.shard_names[0]).read_bytes()
    for index in range(50):
        png = data[int(shards.offset[index]) :][: int(shards.length[index])]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), images_NHW[rows[index]])


def test_the_sample_is_class_balanced() -> None:
    for prefix, share in (("train", 1000), ("t10k", 200)):
        labels = read_idx(SAMPLE / f"{prefix}-labels-idx1-ubyte.gz")
        assert np.bincount(labels).tolist() == [share] * 10


@pytest.mark.multi_process
def test_bytes_do_not_depend_on_the_number_of_workers(written: Path, tmp_path: Path) -> None:
    write_shards(TEST_SPLIT, tmp_path / "again", num_workers=3)
    assert_same_files(written, tmp_path / "again")


@pytest.mark.lengthy
def test_another_seed_is_another_order_of_the_same_samples(written: Path, tmp_path: Path) -> None:
    config = WriteConfig(kind="idx", source=SAMPLE, split="test", shard_samples=300, seed=1)
    write_shards(config, tmp_path / "other")
    first, second = open_shards(written), open_shards(tmp_path / "other")
    assert first.fingerprint != second.fingerprint
    assert list(first.keys) != list(second.keys) and sorted(first.keys) == sorted(second.keys)
    in_order = WriteConfig(kind="idx", source=SAMPLE, split="test", shard_samples=300, seed=None)
    write_shards(in_order, tmp_path / "sorted")
    keys = list(open_shards(tmp_path / "sorted").keys)
    assert keys == sorted(keys)


def test_an_interrupted_run_continues_to_the_same_bytes(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "cut"
    calls: list[int] = []

    def failing(plan: Plan, index: int, *args: Any, **options: Any) -> None:
        calls.append(index)
        if index == 3 and len(calls) == 4:
            raise OSError(28, "No space left on device")
        write_shard(plan, index, *args, **options)

    monkeypatch.setattr(workers, "write_shard", failing)
    with pytest.raises(OSError, match="No space left"):
        write_shards(TEST_SPLIT, target)
    with pytest.raises(FileNotFoundError, match="unfinished"):
        open_shards(target)
    write_shards(TEST_SPLIT, target)
    assert calls == [0, 1, 2, 3, 3, 4, 5, 6]
    assert_same_files(written, target)


def test_a_complete_set_is_not_written_again(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "write_shard", None)
    assert write_shards(TEST_SPLIT, written).num_samples == 2000
    assert not (written / WORK_FOLDER).exists()


def test_a_target_with_something_else_is_refused(written: Path, tmp_path: Path) -> None:
    other = WriteConfig(kind="idx", source=SAMPLE, split="train", shard_samples=300)
    with pytest.raises(ValueError, match="complete shard set made with another split; choose another target"):
        write_shards(other, written)
    (tmp_path / "strange.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"already holds strange\.tar"):
        write_shards(TEST_SPLIT, tmp_path)


@UNCLOSED
def test_metadata_can_be_left_out(tmp_path: Path) -> None:
    options = ImageOptions(metadata=False)
    write_shards(WriteConfig(kind="idx", source=SAMPLE, split="test", options=options), tmp_path / "bare")
    sample = next(iter(wds.WebDataset(str(tmp_path / "bare" / "shard-000000.tar"), shardshuffle=False)))
    assert {name for name in sample if not name.startswith("__")} == {"png", "cls"}


def test_png_holds_the_pixels() -> None:
    image_HW = np.random.default_rng(0).integers(0, 256, (300, 301), np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(image_HW)))), image_HW)
