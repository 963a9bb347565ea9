"""Every kind of source gives the same images and labels that went into it."""

import gzip
import io
import json
import os
import re
import shutil
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable
from datetime import date, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from data_pipelines.shards.index import ShardSet, open_shards
from data_pipelines.sources.folder import list_samples
from data_pipelines.sources.kinds import KINDS
from data_pipelines.sources.listing import class_names_from
from data_pipelines.upkeep.foreign import index_shards
from data_pipelines.upkeep.verify import verify_shards
from data_pipelines.writing.image_header import orientation
from data_pipelines.writing.prepare import ImageOptions
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.cli import main
from sret_scale.commands.shards import write as write_command
from tests.data.shard_sources import (
    IMAGENET_LIKE,
    encoded,
    jpeg,
    make_ilsvrc,
    make_parquet,
    make_tar,
    make_tree,
    members_of,
    pixels,
)


def written(tmp_path: Path, kind: str, source: Path, split: str | None = None, **options: int | None) -> ShardSet:
    target = tmp_path / f"shards-{kind}-{split}"
    write_shards(WriteConfig(kind=kind, source=source, split=split, **options), target)  # type: ignore[arg-type]
    assert verify_shards(target) == []
    return open_shards(target)


def image(shards: ShardSet, index: int) -> bytes:
    data = (shards.folder / shards.shard_names[int(shards.shard_of[index])]).read_bytes()
    return data[int(shards.offset[index]) :][: int(shards.length[index])]


def test_the_command_offers_the_kinds_that_there_are() -> None:
    assert set(write_command.KINDS) == set(KINDS)


def test_image_folder(tmp_path: Path) -> None:
    shards = written(tmp_path, "folder", make_tree(tmp_path / "tree"), shard_samples=10)
    assert shards.class_names == list(IMAGENET_LIKE)
    assert shards.num_samples == 24 and shards.num_shards == 3
    for index in range(24):
        name, number = re.fullmatch(r"(n\d+)/n\d+_(\d+)", shards.key(index)).groups()
        label = IMAGENET_LIKE.index(name)
        assert shards.label[index] == label
        assert image(shards, index) == jpeg(100 * label + int(number))
        assert (shards.width[index], shards.height[index]) == (24, 20)


def test_ilsvrc_train_is_read_inside_its_tar(tmp_path: Path) -> None:
    shards = written(tmp_path, "ilsvrc", make_ilsvrc(tmp_path / "source"), "train")
    assert shards.class_names == list(IMAGENET_LIKE) and shards.num_samples == 15
    for index in range(15):
        name, number = shards.key(index).split("_")
        assert image(shards, index) == jpeg(100 * int(shards.label[index]) + int(number))
        assert IMAGENET_LIKE[shards.label[index]] == name


@pytest.mark.parametrize("labels", ["kit", "list"])
def test_ilsvrc_val_takes_its_labels_from_the_kit_or_a_list(tmp_path: Path, labels: str) -> None:
    source = make_ilsvrc(tmp_path / "source")
    if labels == "list":
        (source / "ILSVRC2012_devkit_t12.tar.gz").unlink()
        synsets = ("n01440764", "n01484850", "n01443537", "n01443537", "n01440764", "n01484850")
        (source / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(synsets) + "\n")
    shards = written(tmp_path, "ilsvrc", source, "val", seed=None)
    # Numbers of the kit 2 1 3 3 2 1 mean these places in the sorted synsets.
    assert shards.label.tolist() == [0, 2, 1, 1, 0, 2]
    assert [shards.key(index)[-1] for index in range(6)] == list("123456")
    assert [image(shards, index) for index in range(6)] == [jpeg(number) for number in range(1, 7)]


def test_parquet(tmp_path: Path) -> None:
    shards = written(tmp_path, "parquet", make_parquet(tmp_path / "source"), "train")
    assert shards.num_samples == 14 and shards.class_names == list(IMAGENET_LIKE)
    for index in range(14):
        number, row = int(shards.key(index)[6:11]), int(shards.key(index)[-6:])
        assert image(shards, index) == jpeg(10 * number + row) and shards.label[index] == row % 3


def make_labels(folder: Path, labels: Any, name: str = "train-0.parquet", names: Any = None) -> Path:
    """A Parquet file with these labels, and metadata of the datasets library where `names` are given."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    folder.mkdir(exist_ok=True)
    table = pa.table({"image": pa.array([jpeg(1)] * len(labels), pa.binary()), "label": labels})
    if names is not None:
        text = json.dumps({"info": {"features": {"label": {"names": names}}}})
        table = table.replace_schema_metadata({"huggingface": text})
    parquet.write_table(table, folder / name)
    return folder


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2**32], r"train-0\.parquet: label 4294967296 in row 2"),
        ([0, 2**31], r"train-0\.parquet: label 2147483648 in row 1"),
        (np.array([0, 2**64 - 1], np.uint64), r"label 18446744073709551615 in row 1"),
        ([0, -1], r"train-0\.parquet: label -1 in row 1"),
        ([0, 5], r"train-0\.parquet: label 5 of image 1 is outside the 3 classes"),
        ([0, None, 1, None], r"train-0\.parquet: row 1 and 1 more have no label"),
        ([0.0, 1.7], "train-0\\.parquet: column label: expected whole numbers, got double"),
        ([True, False], "expected whole numbers, got bool"),
        ([date(2026, 1, 1)], "expected whole numbers, got date32"),
        ([datetime(2026, 1, 1)], "expected whole numbers, got timestamp"),
        (["cat", "dog"], "expected whole numbers, got string"),
        ([b"1"], "expected whole numbers, got binary"),
        ([[0], [1, 2]], "expected whole numbers, got list"),
        ([{"a": 1}], "expected whole numbers, got struct"),
        ([None, None], "expected whole numbers, got null"),
    ],
)
def test_labels_of_parquet_are_whole_numbers_in_range(tmp_path: Path, labels: Any, message: str) -> None:
    source = make_labels(tmp_path / "source", labels, names=["a", "b", "c"])
    with pytest.raises(ValueError, match=message):
        write_shards(WriteConfig(kind="parquet", source=source), tmp_path / "target")


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.uint32, np.int64, np.uint64])
def test_labels_of_parquet_of_any_width_are_kept(tmp_path: Path, kind: Any) -> None:
    source = make_labels(tmp_path / "source", np.array([2, 0, 1, 0], kind))
    assert written(tmp_path, "parquet", source, seed=None).label.tolist() == [2, 0, 1, 0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "c", "b"], r"train-1\.parquet: names a class 'c' that is 'b' in train-0\.parquet"),
        (["a", "b"], r"train-1\.parquet: names a class None that is 'c'"),
        (None, r"train-1\.parquet: names a class None that is 'a'"),
        ("abc", r"train-1\.parquet: metadata .* class names that are empty"),
        (["a", "b", "b"], r"train-1\.parquet: metadata .* twice"),
        (["a", 1, "c"], r"train-1\.parquet: metadata .* no text"),
    ],
)
def test_files_of_parquet_agree_in_their_class_names(tmp_path: Path, names: Any, message: str) -> None:
    make_labels(tmp_path / "source", [0, 1], names=["a", "b", "c"])
    source = make_labels(tmp_path / "source", [0, 1], "train-1.parquet", names=names)
    with pytest.raises(ValueError, match=message):
        write_shards(WriteConfig(kind="parquet", source=source), tmp_path / "target")


def test_rows_of_parquet_are_bounded_by_the_size_of_the_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    num_rows = 1 << 20
    table = pa.table({"image": pa.nulls(num_rows, pa.binary()), "label": np.zeros(num_rows, np.int64)})
    parquet.write_table(table, tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match=r"train-0\.parquet: 1,048,576 rows in [\d,]+ bytes, so without images"):
        write_shards(WriteConfig(kind="parquet", source=tmp_path), tmp_path / "target")


def test_images_of_parquet_are_bytes(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"image": ["a.jpg"] * 200, "label": [0] * 200}), tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match=r"column image: expected bytes, or a struct .*, got string"):
        write_shards(WriteConfig(kind="parquet", source=tmp_path), tmp_path / "target")


@pytest.mark.parametrize("kind", ["idx", "tars", "ilsvrc"])
def test_lists_saved_on_windows_are_read(tmp_path: Path, kind: str) -> None:
    """With a byte order mark, and lines that end in CR LF."""
    split, expected = None, ["cat", "dog", "fish"]
    if kind == "ilsvrc":
        source, split, expected = make_ilsvrc(tmp_path / "source"), "val", list(IMAGENET_LIKE)
        (source / "ILSVRC2012_devkit_t12.tar.gz").unlink()
        lines, name = [*IMAGENET_LIKE, *IMAGENET_LIKE], "imagenet_2012_validation_synset_labels.txt"
    else:
        source, lines, name = tmp_path / "source", expected, "classes.txt"
        source.mkdir()
        if kind == "tars":
            make_tar(source / "some.tar", {"a.jpg": jpeg(1), "a.cls": b"2"})
        else:
            split = "train"
            (source / "train-images-idx3-ubyte").write_bytes(idx_file(np.zeros((2, 4, 4))))
            (source / "train-labels-idx1-ubyte").write_bytes(idx_file(np.array([0, 2])))
    (source / name).write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    assert written(tmp_path, kind, source, split).class_names == expected


def test_a_list_of_classes_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    make_tar(tmp_path / "some.tar", {"a.jpg": jpeg(1), "a.cls": b"0"})
    (tmp_path / "classes.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"classes\.txt: expected class names as text in UTF-8"):
        write_shards(WriteConfig(kind="tars", source=tmp_path), tmp_path / "target")


def test_a_shuffled_write_reads_each_row_group_once_and_once_more_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as parquet

    num_reads = Counter[str]()
    whole = parquet.ParquetFile.read_row_group

    def counted(file: Any, group: int, columns: list[str]) -> Any:
        num_reads["groups"] += 1
        return whole(file, group, columns=columns)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted)
    source = make_parquet(tmp_path / "source", 60)
    shards = written(tmp_path, "parquet", source, shard_samples=25)
    num_groups = 2 * 20
    assert num_groups <= num_reads["groups"] <= num_groups + shards.num_shards - 1
    # Each shard mixes row groups that lie far apart, and their images.
    rows = [(int(key[6:11]), int(key[-6:])) for key in list(shards.keys)[:25]]
    assert len({(file, row // 3) for file, row in rows}) >= 8 and rows != sorted(rows)
    assert sum(abs(b[1] - a[1]) == 1 for a, b in pairwise(rows)) < 8
    assert {file for file, _ in rows} == {0, 1}


def test_shards_written_again_keep_images_labels_and_keys(tmp_path: Path) -> None:
    first = written(tmp_path, "folder", make_tree(tmp_path / "tree"), shard_samples=5)
    second = written(tmp_path, "tars", first.folder, seed=7, shard_samples=9)
    assert members_of(second.folder, "json") == members_of(first.folder, "json")
    order = {key: index for index, key in enumerate(first.keys)}
    assert second.class_names == first.class_names and sorted(second.keys) == sorted(first.keys)
    assert list(second.keys) != list(first.keys)
    for index, key in enumerate(second.keys):
        assert image(second, index) == image(first, order[key])
        assert second.label[index] == first.label[order[key]]


def test_tars_of_others(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    files = {
        "a b.jpg": jpeg(1),
        "a b.cls": b"1\n",
        "x/y.PNG": encoded(pixels(2), "PNG"),
        "x/y.cls": b"0",
        "x/y.txt": b"",
        "x/y.json": b'{"licence": "CC BY",  "tags": [1, 2]}',
    }
    make_tar(source / "some-0.tar", files)
    (source / "classes.txt").write_text("cat\ndog\nfish\n")
    shards = written(tmp_path, "tars", source, seed=None)
    # Metadata of others stays as it is; where there is none, ours says class and origin.
    metadata = members_of(shards.folder, "json")
    assert metadata["x/y"] == files["x/y.json"]
    assert json.loads(metadata["a%20b"]) == {"class": "dog", "source": "some-0.tar/a b.jpg"}
    assert list(shards.keys) == ["a%20b", "x/y"]
    assert shards.label.tolist() == [1, 0] and shards.class_names == ["cat", "dog", "fish"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jpg": b"x"}, r"sample 'a' has no label"),
        ({"a.jpg": b"x", "a.cls": b"cat"}, r"label b'cat' of sample 'a', expected a whole number"),
        ({"a.jpg": b"x", "a.cls": b"-1"}, r"label b'-1'"),
        ({"a.jpg": b"x", "a.cls": b"1_0"}, r"label b'1_0'"),
        ({"a.jpg": b"x", "a.cls": b"1.7"}, r"label b'1.7'"),
        ({"a.jpg": b"x", "a.cls": b"4294967296"}, r"label b'4294967296'"),
        ({"a.jpg": b"x", "a.cls": b"0" * 100_000}, r"label b'0{20}'"),
        ({"a.jpg": b"x", "a.cls": b"7"}, r"label 7 of image 0 is outside the 2 classes"),
        ({"a.cls": b"1"}, "has 0 images"),
        ({"a.jpg": b"x", "a.png": b"x", "a.cls": b"1"}, "has 2 images"),
        (
            {"a.jpg": b"x", "a.cls": b"1", "b.jpg": b"x", "b.cls": b"1", "a.jpeg": b"y", "A.cls": b"1"},
            "has 0 images|label",
        ),
        ({"../a.jpg": b"x"}, "leads out of the folder"),
    ],
)
def test_tars_that_cannot_be_a_source(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    make_tar(tmp_path / "some.tar", files)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=message):
        write_shards(WriteConfig(kind="tars", source=tmp_path), tmp_path / "target")


def test_a_source_tar_cut_off(tmp_path: Path) -> None:
    source = make_ilsvrc(tmp_path / "source")
    path = source / "ILSVRC2012_img_train.tar"
    data = path.read_bytes()
    for kept in (len(data) // 2, len(data) // 2 // 512 * 512, 3 * 512):
        path.write_bytes(data[:kept])
        with pytest.raises(ValueError, match=r"img_train\.tar: at offset \d+: cut off.*get the file again"):
            write_shards(WriteConfig(kind="ilsvrc", source=source, split="train"), tmp_path / "target")


@pytest.mark.parametrize(
    ("kind", "split", "message"),
    [
        ("idx", None, "split of IDX files: expected train or test, got None"),
        ("idx", "train", "no such file, with or without .gz"),
        ("folder", "train", "an image folder has none"),
        ("folder", None, "no folders in it"),
        ("ilsvrc", "test", "expected train or val"),
        ("ilsvrc", "val", r"ILSVRC2012_img_val\.tar: no such file"),
        ("tars", None, r"no \.tar files"),
        ("tars", "x", "a folder of tars has none"),
        ("parquet", "train", r"no train-\*\.parquet"),
        (
            "zip",
            None,
            "source kind 'zip': expected one of folder, idx, ilsvrc, mazes, moses, parquet, products, tars, text, tsv",
        ),
    ],
)
def test_sources_that_are_not_there(tmp_path: Path, kind: str, split: str | None, message: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises((ValueError, OSError), match=message):
        write_shards(WriteConfig(kind=kind, source=source, split=split), tmp_path / "target")
    assert not (tmp_path / "target").exists()


def idx_file(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (idx_file(np.zeros((2, 4, 4))), idx_file(np.array([0, 3])), "label 3 of image 1 is outside the 2 classes"),
        (idx_file(np.zeros((2, 4, 4))), idx_file(np.array([0])), "expected one label for each image"),
        (idx_file(np.zeros((2, 4, 4)))[:-1], idx_file(np.array([0, 1])), "31 bytes of content, its header says"),
        (idx_file(np.zeros((2, 4, 4))) + b"x", idx_file(np.array([0, 1])), "more than 32 bytes of content"),
        (idx_file(np.zeros((2, 4, 4))), idx_file(np.array([[0, 1]])), "expected one label for each image"),
        # 2^64 bytes by its header, which 64 bits take for none.
        (b"\0\0\x08\x03" + b"\0\1\0\0" * 2 + b"\xff" * 4, idx_file(np.array([0, 1])), "at most 1,073,741,824 are read"),
        (b"\x1f\x8b\x08garbage", idx_file(np.array([0, 1])), "broken gzip file"),
        (b"\0\0\x08\xff" + b"\0" * 1020, idx_file(np.array([0, 1])), "not an IDX file"),
        (b"hello", idx_file(np.array([0, 1])), "not an IDX file"),
        (b"", idx_file(np.array([0, 1])), "not an IDX file"),
        (idx_file(np.zeros((0, 4, 4))), idx_file(np.zeros(0)), "no images in it"),
    ],
)
def test_broken_idx_files(tmp_path: Path, images: bytes, labels: bytes, message: str) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(images)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=message):
        write_shards(WriteConfig(kind="idx", source=tmp_path, split="train"), tmp_path / "target")


@pytest.mark.lengthy
def test_a_packed_idx_file_is_unpacked_no_further_than_its_header_says(tmp_path: Path) -> None:
    for name, values in (("images-idx3", np.zeros((2, 4, 4))), ("labels-idx1", np.array([0, 1]))):
        # A bomb: a thousand times the memory that the test may use.
        with gzip.open(tmp_path / f"train-{name}-ubyte.gz", "wb", compresslevel=9) as file:
            file.write(idx_file(values) + bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than 32 bytes of content"):
            write_shards(WriteConfig(kind="idx", source=tmp_path, split="train"), tmp_path / "target")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["tars", "parquet", "index"])
def test_a_label_out_of_all_bounds_makes_no_list_of_classes(tmp_path: Path, kind: str) -> None:
    """2^31 - 1 fits the column of labels, and would make as many class names."""
    if kind == "parquet":
        make_labels(tmp_path, [0, 2**31 - 1])
    else:
        make_tar(tmp_path / "some.tar", {"a.jpg": jpeg(1), "a.cls": b"2147483647"})
    with pytest.raises(ValueError, match="a label of 2,147,483,647, expected less than 65,536"):
        if kind == "index":
            index_shards(tmp_path)
        else:
            write_shards(WriteConfig(kind=kind, source=tmp_path), tmp_path / "target")


def test_a_folder_that_may_not_be_read() -> None:
    with tempfile.TemporaryDirectory() as name:
        tree = make_tree(Path(name) / "tree", 2)
        (tree / IMAGENET_LIKE[1]).chmod(0)
        Path(name).chmod(0o755)
        # Permissions do not bind root, so another user looks.
        user = os.geteuid()
        os.seteuid(65534 if user == 0 else user)
        try:
            with pytest.raises(PermissionError, match=f"{IMAGENET_LIKE[1]}: cannot be read"):
                list_samples(tree, None)
        finally:
            os.seteuid(user)
            (tree / IMAGENET_LIKE[1]).chmod(0o755)


def _loop(tree: Path) -> None:
    (tree / IMAGENET_LIKE[0] / "again").symlink_to(tree)


def _dangling(tree: Path) -> None:
    (tree / IMAGENET_LIKE[0] / "gone.JPEG").symlink_to(tree / "nowhere")


def _to_itself(tree: Path) -> None:
    (tree / IMAGENET_LIKE[0] / "self.JPEG").symlink_to(tree / IMAGENET_LIKE[0] / "self.JPEG")


def _empty_class(tree: Path) -> None:
    (tree / "n02000000").mkdir()


def _duplicate(tree: Path) -> None:
    (tree / IMAGENET_LIKE[0] / f"{IMAGENET_LIKE[0]}_1.png").write_bytes(encoded(pixels(5), "PNG"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_loop, "again: a link to a folder above it"),
        (_dangling, r"gone\.JPEG: a link to a file that is not there"),
        (_to_itself, r"self\.JPEG"),
        (_empty_class, "n02000000: a class without images"),
        (_duplicate, r"n01440764_1\.JPEG' and '.*n01440764_1\.png' have the same key"),
    ],
)
def test_trees_that_are_not_sound(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    tree = make_tree(tmp_path / "tree", 2)
    damage(tree)
    with pytest.raises((ValueError, OSError), match=message):
        write_shards(WriteConfig(kind="folder", source=tree), tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_links_to_images_are_followed(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 2)
    (tree / "linked").symlink_to(tree / IMAGENET_LIKE[0])
    assert written(tmp_path, "folder", tree).num_samples == 8


def test_odd_names_survive(tmp_path: Path) -> None:
    folder = tmp_path / "tree" / 'class "one"\n'
    folder.mkdir(parents=True)
    names = [
        "with space.jpg",
        'it\'s "quoted".jpg',
        "new\nline.jpg",
        "Zo\xeb \u56fe.jpg",
        "v1.2.final.jpg",
        ".hidden.jpg",
        "x" * 200,
    ]
    for number, name in enumerate(names):
        (folder / name).write_bytes(jpeg(number))
    (folder / "\udcff\udcfe.jpg").write_bytes(jpeg(99))
    shards = written(tmp_path, "folder", tmp_path / "tree", shard_samples=3)
    assert shards.num_samples == len(names) + 1 and shards.class_names == ['class "one"\n']
    assert len(set(shards.keys)) == len(names) + 1


def test_hidden_and_system_entries_are_passed_over_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree = make_tree(tmp_path / "tree", 2)
    first = tree / IMAGENET_LIKE[0]
    for folder in (tree / ".ipynb_checkpoints", first / ".ipynb_checkpoints", first / "@eaDir", tree / "__MACOSX"):
        folder.mkdir()
        (folder / "copy.JPEG").write_bytes(jpeg(1))
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._x.JPEG"):
        (first / name).write_bytes(b"x")
    shards = written(tmp_path, "folder", tree)
    assert shards.class_names == list(IMAGENET_LIKE) and shards.num_samples == 6
    assert "passed over 8 hidden or system entries" in caplog.text


@pytest.mark.parametrize(
    ("names", "warns"), [(("train", "val"), True), (("Test", "train"), True), (("train", "bus"), False)]
)
def test_classes_called_like_splits_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: tuple[str, str], warns: bool
) -> None:
    for index, name in enumerate(names):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "a.jpg").write_bytes(jpeg(index))
    assert written(tmp_path, "folder", tmp_path / "tree").num_samples == 2
    assert ("where these are splits" in caplog.text) == warns


def test_a_share_of_each_class_is_kept_for_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = make_tree(tmp_path / "tree", 10)
    (tree / "single").mkdir()
    (tree / "single" / "one.jpg").write_bytes(jpeg(1))

    def both(target: str, *more: str) -> tuple[ShardSet, ShardSet]:
        command = ["shards", "write", "folder", str(tree), str(tmp_path / target), "--workers", "1", "--split", "0.2"]
        assert main([*command, *more]) == 0
        return open_shards(tmp_path / target / "train"), open_shards(tmp_path / target / "val")

    train, val = both("first")
    assert train.class_names == val.class_names == [*IMAGENET_LIKE, "single"]
    assert np.bincount(train.label).tolist() == [8, 8, 8, 1] and np.bincount(val.label).tolist() == [2, 2, 2]
    assert sorted([*train.keys, *val.keys]) == sorted(written(tmp_path, "folder", tree).keys)
    same, other = both("second", "--keep-order")[1], both("third", "--seed", "1")[1]
    assert set(same.keys) == set(val.keys) != set(other.keys)
    # The classes are drawn each by itself: another one leaves their images where they are.
    (tree / "a_new_one").mkdir()
    (tree / "a_new_one" / "one.jpg").write_bytes(jpeg(2))
    assert set(both("fourth")[1].keys) == set(val.keys)
    capsys.readouterr()
    for share, message in (("1.5", "a share between 0 and 1"), ("0.01", "no images for validation at a share of 0.01")):
        command = ["shards", "write", "folder", str(tree), str(tmp_path / "no"), "--split", share, "--workers", "1"]
        assert main(command) == 2
        assert message in capsys.readouterr().err


def test_classes_are_numbered_as_in_the_training_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = written(tmp_path, "folder", make_tree(tmp_path / "tree", 2))
    shutil.rmtree(tmp_path / "tree" / IMAGENET_LIKE[1])
    names = class_names_from(train.folder)

    def set_from(source: Path, target: str, kind: str = "folder") -> ShardSet:
        write_shards(WriteConfig(kind=kind, source=source, class_names=names), tmp_path / target)
        return open_shards(tmp_path / target)

    two = set_from(tmp_path / "tree", "two")
    assert two.class_names == list(IMAGENET_LIKE) and set(two.label.tolist()) == {0, 2}
    for index in range(two.num_samples):
        assert two.key(index).startswith(IMAGENET_LIKE[two.label[index]])
    # Folders called by the numbers of the training set's classes, as ImageNetV2's, and in the order of their names.
    (tmp_path / "tree" / IMAGENET_LIKE[0]).rename(tmp_path / "tree" / "2")
    (tmp_path / "tree" / IMAGENET_LIKE[2]).rename(tmp_path / "tree" / "0")
    numbers = set_from(tmp_path / "tree", "numbers")
    assert "have numbers for names" in caplog.text and numbers.class_names == list(IMAGENET_LIKE)
    assert all(numbers.key(index).startswith(str(numbers.label[index])) for index in range(numbers.num_samples))
    with pytest.raises(ValueError, match="made with another classes"):
        write_shards(WriteConfig(kind="folder", source=tmp_path / "tree"), tmp_path / "numbers")
    (tmp_path / "tree" / "0").rename(tmp_path / "tree" / "dog")
    with pytest.raises(ValueError, match="class 0, '2', is none of these"):
        set_from(tmp_path / "tree", "dog")
    (tmp_path / "names.txt").write_text("x\ny\n")
    assert class_names_from(tmp_path / "names.txt") == ("x", "y")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_applied_with_resize_and_else_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """A picture that lies on its side, as cameras store them: red above, when it is shown."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture = Image.new("RGB", (40, 60), "blue")
    picture.paste("red", (0, 0, 40, 30))
    stored = encoded(picture.transpose(Image.Transpose.ROTATE_90), kind, exif=exif)
    for index, content in enumerate((stored, encoded(picture, kind))):
        (tmp_path / "tree" / "ab"[index]).mkdir(parents=True)
        (tmp_path / "tree" / "ab"[index] / "x").write_bytes(content)
    shards = written(tmp_path, "folder", tmp_path / "tree", seed=None)
    assert "1 images are to be turned before they are shown" in caplog.text
    assert image(shards, 0) == stored and (shards.width[0], shards.height[0]) == (60, 40)
    caplog.clear()
    # One that is smaller than the limit is turned too, and its bytes do not say it twice.
    for side, size in ((20, (20, 30)), (50, (40, 60))):
        config = WriteConfig(
            kind="folder", source=tmp_path / "tree", seed=None, options=ImageOptions(resize=side, quality=95)
        )
        write_shards(config, tmp_path / f"side{side}")
        upright = open_shards(tmp_path / f"side{side}")
        assert (upright.width.tolist(), upright.height.tolist()) == ([size[0]] * 2, [size[1]] * 2)
        for index in range(2):
            pixels = Image.open(io.BytesIO(image(upright, index)))
            assert pixels.size == size and orientation(image(upright, index)) == 1
            assert pixels.convert("RGB").getpixel((5, 5))[0] > 200
    assert "turned" not in caplog.text


def test_a_damaged_note_of_the_orientation_damages_no_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    sound = encoded(pixels(1), "JPEG", exif=exif)
    place = sound.index(b"Exif")
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(sound)
        for offset in rng.integers(place + 6, place + 40, 3):
            damaged[offset] = rng.integers(256)
        assert 1 <= orientation(bytes(damaged)) <= 8
