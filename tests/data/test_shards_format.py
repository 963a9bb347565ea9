"""The format page is enough to read a set: a reader written from it finds every sample and accounts for every byte."""

import json
from pathlib import Path

import pytest

from data_pipelines.shards.index import open_shards
from data_pipelines.writing.prepare import ImageOptions
from data_pipelines.writing.write import WriteConfig, write_shards
from tests.data.shard_sources import IMAGENET_LIKE, encoded, make_tree, pixels
from tests.reference import shard_set


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = make_tree(tmp_path_factory.mktemp("source") / "tree")
    (tree / IMAGENET_LIKE[1] / f"{'a long name ' * 12}\u56fe.JPEG").write_bytes(encoded(pixels(77), "PNG"))
    return tree


@pytest.mark.parametrize("hash_name", ["xxh3_128", "sha256"])
@pytest.mark.parametrize("metadata", [True, False])
def test_a_reader_from_the_page_alone_finds_every_sample(
    tree: Path, tmp_path: Path, hash_name: str, metadata: bool
) -> None:
    options = ImageOptions(metadata=metadata)
    config = WriteConfig(kind="folder", source=tree, shard_samples=9, hash_name=hash_name, options=options)
    write_shards(config, tmp_path / "set")
    shards = open_shards(tmp_path / "set")
    samples = list(shard_set.read_samples(tmp_path / "set"))
    assert [sample.key for sample in samples] == list(shards.keys) and len(samples) == 25
    assert [sample.label for sample in samples] == shards.label.tolist()
    assert [sample.size for sample in samples] == list(zip(shards.width.tolist(), shards.height.tolist(), strict=True))
    files = {path.read_bytes(): path for path in tree.rglob("*.JPEG")}
    assert len(files) == 25 and {sample.image for sample in samples} == set(files)
    for sample in samples:
        path = files[sample.image]
        assert sample.extension == ("png" if sample.image.startswith(b"\x89PNG") else "jpg")
        assert IMAGENET_LIKE[sample.label] == path.parent.name
        origin = {"class": path.parent.name, "source": str(path.relative_to(tree))}
        assert sample.metadata == (origin if metadata else None)


def test_the_reader_from_the_page_sees_what_was_changed(tree: Path, tmp_path: Path) -> None:
    write_shards(WriteConfig(kind="folder", source=tree, shard_samples=9), tmp_path / "set")
    for name, place in (("shard-000001.tar", 5000), ("index.npz", 300), ("manifest.json", 150)):
        path = tmp_path / "set" / name
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.raises((AssertionError, json.JSONDecodeError, KeyError)):
            list(shard_set.read_samples(tmp_path / "set"))
        data[place] ^= 1
        path.write_bytes(data)
