"""Samples with label maps and attributes: written, checked, streamed, mixed, resumed; refused where they are bad."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.grids.made import GridOptions
from data_pipelines.image.map_png import decode_map
from data_pipelines.remote.shard_sets import open_data
from data_pipelines.shards.classes import renumbered
from data_pipelines.shards.index import ShardSet, open_shards
from data_pipelines.shards.manifest import render_manifest
from data_pipelines.shards.mixture import mix_shards
from data_pipelines.shards.npz_columns import parse_columns, render_columns
from data_pipelines.sources.folder import split_name
from data_pipelines.stream.loader import Batch, DataConfig, LoaderState, TrainLoader, evaluation_batches
from data_pipelines.stream.reader import BadSampleError
from data_pipelines.stream.webdataset_door import to_webdataset
from data_pipelines.upkeep.contact_sheet import draw_contact_sheet
from data_pipelines.upkeep.repair import repair_shards
from data_pipelines.upkeep.verify import verify_shards
from data_pipelines.writing.prepare import ImageOptions
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.cli import main
from sret_scale.distill.label_writer import plan_labels
from tests.data.shard_sources import members_of, pixels
from tests.reference import shard_set

Array = NDArray[Any]

# The flip of the default is for other crops.
AS_STORED = DataConfig(crop="none")
MEMBERS = ("map.png", "distance.png", "before.png")


def make(folder: Path, *, shard_samples: int = 7, num_workers: int = 1, **options: Any) -> ShardSet:
    made = GridOptions(**{"puzzle": "reach", "count": 20, "smallest": 7, "largest": 11, "seed": 3, **options})
    write_shards(
        WriteConfig(kind="mazes", source=made, seed=None, shard_samples=shard_samples), folder, num_workers=num_workers
    )
    return open_shards(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return make(tmp_path_factory.mktemp("mazes") / "set")


def loader(shards: ShardSet, **fields: Any) -> TrainLoader:
    return TrainLoader(shards, replace(AS_STORED, **fields), image_size=12, micro_batch_size=4, seed=5)


def evaluated(shards: ShardSet, batch_size: int = 6) -> list[Batch]:
    return list(evaluation_batches(shards, AS_STORED, image_size=12, batch_size=batch_size, rank=0, world_size=1))


def assert_same(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.indices, other.indices) and torch.equal(one.images, other.images)
        assert one.maps.keys() == other.maps.keys() == {"map", "distance", "before"}
        assert all(torch.equal(one.maps[name], other.maps[name]) for name in one.maps)


def test_rows_have_what_the_tars_have_and_nothing_is_asked_around_it(shards: ShardSet) -> None:
    stored = {name: members_of(shards.folder, name) for name in MEMBERS}
    assert set(shards.members) == set(MEMBERS) and shards.manifest.members == list(MEMBERS)
    assert len(set(shards.width.tolist())) == 3
    rows = 0
    for batch in evaluated(shards):
        assert batch.maps["map"].dtype == torch.uint8 and batch.maps["distance"].dtype == torch.int32
        for row in range(int(batch.valid.sum())):
            index, side = int(batch.indices[row]), int(shards.width[batch.indices[row]])
            for name, around in (("map", 255), ("distance", 0), ("before", 0)):
                map_HW = batch.maps[name][row].clone()
                data = stored[f"{name}.png"][shards.key(index)]
                assert np.array_equal(map_HW[:side, :side], decode_map(data, f"{name}.png", side, side, 2))
                map_HW[:side, :side] = around
                assert (map_HW == around).all()
            assert (batch.images[row, :, side:] == 0).all() and (batch.images[row, :, :, side:] == 0).all()
            assert batch.images[row, 0, :side, :side].any()
            rows += 1
        assert (batch.maps["map"][~batch.valid] == 255).all()
    assert rows == 20


@pytest.mark.multi_process
def test_threads_processes_and_a_resumed_run_give_the_same_rows(shards: ShardSet) -> None:
    steps = list(islice(loader(shards).steps(), 7))
    batches = [step.micro_batches[0] for step in steps]
    assert_same(list(islice(loader(shards, worker_kind="processes", workers=1), 7)), batches)
    state = LoaderState.from_json(steps[2].next_state.to_json())
    assert_same([step.micro_batches[0] for step in islice(loader(shards, workers=1).steps(state), 4)], batches[3:])


def test_sets_are_mixed_where_their_members_are_the_same(shards: ShardSet, tmp_path: Path) -> None:
    other = make(tmp_path / "other", count=6, seed=4)
    mixed = mix_shards([shards, other])
    assert_same(
        evaluated(mixed, 1), [*evaluated(shards, 1), *(replace(b, indices=b.indices + 20) for b in evaluated(other, 1))]
    )
    with pytest.raises(
        ValueError, match=r"path: other members than .*: expected map\.png distance\.png before\.png, got"
    ):
        mix_shards([shards, replace_classes(make(tmp_path / "path", puzzle="path"), shards)])


def replace_classes(shards: ShardSet, like: ShardSet) -> ShardSet:
    return replace(shards, manifest=replace(shards.manifest, class_names=like.class_names))


def test_labels_of_pixels_are_not_renumbered(shards: ShardSet) -> None:
    assert renumbered(shards, ["unreached", "reached"], "run") is shards
    with pytest.raises(ValueError, match="other classes than run: class 0: expected 'reached', got 'unreached'"):
        renumbered(shards, ["reached", "unreached"], "run")


def damage(shards: ShardSet, target: Path, index: int, member: str) -> ShardSet:
    """A copy of the set with one byte of a member changed."""
    copy = make(target)
    place = int(copy.members[member].offset[index]) + int(copy.members[member].length[index]) - 20
    path = copy.folder / copy.shard_names[int(copy.shard_of[index])]
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    return copy


@pytest.mark.parametrize("member", MEMBERS)
def test_a_damaged_map_makes_its_sample_bad_by_name(shards: ShardSet, tmp_path: Path, member: str) -> None:
    broken = damage(shards, tmp_path / "set", 9, member)
    [finding] = verify_shards(broken.folder)
    assert (finding.key, finding.reason) == ("reach-000009", f"{member}'s bytes have changed")
    with pytest.raises(BadSampleError, match=rf"'reach-000009' at offset \d+: {member}: checksum .* have changed"):
        evaluated(broken)
    quarantine = tmp_path / "bad.jsonl"
    steps = loader(broken, max_bad_rate=0.2, quarantine_file=str(quarantine)).steps()
    rows = [step.micro_batches[0] for step in islice(steps, 5)]
    assert 9 not in torch.cat([batch.indices for batch in rows]).tolist()
    assert f'"reason": "{member}: checksum' in quarantine.read_text()


def test_views_that_would_part_image_and_map_are_refused(shards: ShardSet) -> None:
    for fields in ({"crop": "centre"}, {"transform": "a:b"}):
        with pytest.raises(
            ValueError, match=r"used as they are stored: set data\.crop=none and no data\.transform, got"
        ):
            loader(shards, **fields).steps()
    with pytest.raises(ValueError, match=r"set data\.crop=none"):
        next(evaluation_batches(shards, DataConfig(), image_size=12, batch_size=4, rank=0, world_size=1))
    with pytest.raises(ValueError, match=r"11 x 11 pixels do not fit into 9 x 9 .*: set model\.image_size=11"):
        next(evaluation_batches(shards, AS_STORED, image_size=9, batch_size=4, rank=0, world_size=1))
    with pytest.raises(ValueError, match=r"set data\.crop=none"):
        to_webdataset(shards, batch_size=4, image_size=12)
    numbers = {"image_size": 12, "top_k": 1, "num_views": 1, "views_per_file": 1, "batch_size": 4}
    with pytest.raises(ValueError, match=r"set data\.crop=none"):
        plan_labels(shards, Mock(), data=DataConfig(), **numbers)
    # Without views the images and members are whoever's pipeline it is.
    assert next(iter(to_webdataset(shards, batch_size=4)))["png"]


def test_a_reader_from_the_page_alone_finds_the_members_too(shards: ShardSet) -> None:
    stored = {name: members_of(shards.folder, name) for name in MEMBERS}
    found = list(shard_set.read_samples(shards.folder))
    assert len(found) == 20
    assert all(sample.members == {name: stored[name][sample.key] for name in MEMBERS} for sample in found)


@pytest.mark.parametrize("reads", ["shards", "ranges"])
def test_a_set_at_a_url_gives_the_same_rows(shards: ShardSet, tmp_path: Path, reads: str) -> None:
    config = DataConfig(remote_reads=reads, cache_folder=str(tmp_path / "cache"))  # type: ignore[arg-type]
    assert_same(evaluated(open_data(f"file://{shards.folder}", config)), evaluated(shards))


def test_an_image_of_another_size_than_the_index_says_is_a_bad_sample(shards: ShardSet) -> None:
    smaller = replace(shards, width=shards.width * 0 + 7, height=shards.height * 0 + 7)
    with pytest.raises(BadSampleError, match=r"x \d+ pixels, more than 7 x 7 \(data\.crop=none\)"):
        list(evaluation_batches(smaller, AS_STORED, image_size=7, batch_size=20, rank=0, world_size=1))


LABELS = ("ground", "road", "house")


def make_tree(root: Path) -> Path:
    """Five images of 6 x 5 pixels in two folders, with label maps, one of them with a palette, and their names."""
    (root / "town").mkdir(parents=True)
    (root / "village").mkdir()
    (root / "classes.txt").write_text("\n".join(LABELS))
    generator = np.random.default_rng(0)
    for number in range(5):
        folder, labels = root / ("town" if number < 3 else "village"), generator.integers(0, 3, (5, 6), np.uint8)
        labels[0, number] = 255
        pixels(number, 6, 5).save(folder / f"{number}.png")
        image = Image.fromarray(labels)
        if number == 1:
            image.putpalette(generator.integers(0, 256, 768, np.uint8).tobytes())
        image.save(folder / f"{number}.map.png")
    return root


def write_tree(root: Path, target: Path, **options: Any) -> ShardSet:
    config = WriteConfig(kind="folder", source=root, options=ImageOptions(**options))
    write_shards(config, target, max_bad_rate=0.5)
    return open_shards(target)


def labels_of(folder: Path) -> dict[str, Array]:
    """The stored maps by key."""
    return {key: decode_map(data, "map.png", 5, 6, 3) for key, data in members_of(folder, "map.png").items()}


def test_a_folder_with_maps_keeps_their_numbers_and_names_their_labels(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "tree")
    made = write_tree(root, tmp_path / "set")
    assert made.class_names == list(LABELS) and made.label.tolist() == [0] * 5
    stored = labels_of(made.folder)
    assert stored.keys() == {"town/0", "town/1", "town/2", "village/3", "village/4"}
    for key, labels in stored.items():
        assert np.array_equal(labels, np.asarray(Image.open(root / f"{key}.map.png")))
    assert verify_shards(made.folder) == []
    [batch] = evaluation_batches(made, AS_STORED, image_size=6, batch_size=5, rank=0, world_size=1)
    for row, index in enumerate(batch.indices.tolist()):
        assert np.array_equal(batch.maps["map"][row, :5], stored[made.key(index)])
        assert (batch.maps["map"][row, 5:] == 255).all()
    # In two splits, of which none has the other's maps.
    for part, count in (("train", 3), ("val", 2)):
        config = WriteConfig(kind="folder", source=root, split=split_name(part, "0.4", 0))
        assert len(write_shards(config, tmp_path / part).shards) == 1
        assert len(labels_of(tmp_path / part)) == count


def shrink(root: Path) -> None:
    Image.new("L", (5, 5)).save(root / "town" / "1.map.png")


def colour(root: Path) -> None:
    Image.new("RGB", (6, 5)).save(root / "town" / "1.map.png")


def mislabel(root: Path) -> None:
    Image.new("L", (6, 5), 3).save(root / "town" / "1.map.png")


def empty(root: Path) -> None:
    (root / "town" / "1.map.png").write_bytes(b"")


def cut(root: Path) -> None:
    path = root / "town" / "1.map.png"
    path.write_bytes(path.read_bytes()[:60])


def lose(root: Path) -> None:
    (root / "town" / "1.map.png").unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (shrink, "map.png: 5 x 5 pixels, expected those of its image, 6 x 5"),
        (colour, "map.png: expected a PNG of 8 bits a pixel, grey or with a palette"),
        (mislabel, "map.png: label 3, expected 0 to 2, or 255 for nothing asked"),
        (empty, "map.png: missing or empty, and other samples have one"),
        (lose, "map.png: missing or empty, and other samples have one"),
        (cut, "map.png: not a readable image"),
    ],
)
def test_a_bad_map_makes_a_bad_image(tmp_path: Path, spoil: Callable[[Path], None], reason: str) -> None:
    root = make_tree(tmp_path / "tree")
    spoil(root)
    with pytest.raises(ValueError, match=f"'town/1.png': .*{re.escape(reason)}.*--on-bad skip"):
        write_tree(root, tmp_path / "set")
    made = write_tree(root, tmp_path / "set", on_bad="quarantine")
    assert made.num_samples == 4 and made.manifest.num_rejected == 1
    assert (made.folder / "quarantine" / "town%2F1").read_bytes() == (root / "town" / "1.png").read_bytes()
    [line] = (made.folder / "rejected.jsonl").read_text().splitlines()
    assert reason in json.loads(line)["reason"]


def test_what_makes_labels_doubtful_is_always_an_error(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "tree")
    (root / "town" / "1.png").rename(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"town/1\.map\.png: a map without an image; remove it, or add the image"):
        write_tree(root, tmp_path / "set", on_bad="skip")
    (tmp_path / "1.png").rename(root / "town" / "1.png")
    with pytest.raises(ValueError, match="other classes than those given: class 0: expected 'road', got 'ground'"):
        write_shards(WriteConfig(kind="folder", source=root, class_names=LABELS[1:]), tmp_path / "set")
    with pytest.raises(ValueError, match="images with label maps are not resized; leave out --resize"):
        write_tree(root, tmp_path / "set", resize=3)
    (root / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"classes\.txt: missing; name the labels of the maps in it"):
        write_tree(root, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_tars_are_written_again_and_repaired_with_their_maps(shards: ShardSet, tmp_path: Path) -> None:
    write_shards(WriteConfig(kind="tars", source=shards.folder), tmp_path / "again")
    for name in MEMBERS:
        assert members_of(tmp_path / "again", name) == members_of(shards.folder, name)
    assert verify_shards(tmp_path / "again") == []
    broken = damage(shards, tmp_path / "set", 9, "distance.png")
    assert repair_shards(broken.folder, tmp_path / "less").num_dropped == 1
    assert repair_shards(broken.folder, tmp_path / "whole", copy=shards.folder).num_replaced == 1
    for name in MEMBERS:
        whole = members_of(shards.folder, name)
        assert members_of(tmp_path / "whole", name) == whole
        assert members_of(tmp_path / "less", name) == {key: whole[key] for key in whole if key != "reach-000009"}
    assert verify_shards(tmp_path / "less") == verify_shards(tmp_path / "whole") == []


def test_links_to_tars_of_other_names_keep_their_maps(shards: ShardSet, tmp_path: Path) -> None:
    """As a hub's cache has them: `set/shard-000000.tar` is a link to `blobs/abc0`."""
    broken = damage(shards, tmp_path / "set", 9, "distance.png")
    (tmp_path / "blobs").mkdir()
    for number, name in enumerate(shards.shard_names):
        for folder in (tmp_path / "sound", broken.folder):
            folder.mkdir(exist_ok=True)
            blob = tmp_path / "blobs" / f"abc{number}-{folder.name}"
            shutil.copy((shards if folder.name == "sound" else broken).folder / name, blob)
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(f"../blobs/{blob.name}")
    shutil.copy(shards.folder / "manifest.json", tmp_path / "sound")
    write_shards(WriteConfig(kind="tars", source=tmp_path / "sound"), tmp_path / "again")
    assert repair_shards(broken.folder, tmp_path / "less").num_dropped == 1
    for name in MEMBERS:
        whole = members_of(shards.folder, name)
        assert members_of(tmp_path / "again", name) == whole
        assert members_of(tmp_path / "less", name) == {key: whole[key] for key in whole if key != "reach-000009"}


def test_info_names_the_members_and_the_sheet_shows_them(
    shards: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", "info", str(shards.folder)]) == 0
    told = capsys.readouterr().out
    # The classes are those of pixels, which the index does not count.
    assert re.search(r"\n  members +image map\.png distance\.png before\.png\n", told) and "#" not in told
    sheet = draw_contact_sheet(shards.folder, num_images=2)
    # Two rows of four cells of 112 pixels: image, labels, distance, distance before.
    assert sheet.size == (4 * 112 + 2 * 6, 2 * (112 + 14 + 6) + 6)
    cells = [np.asarray(sheet)[6 : 6 + 112, 6 + 112 * number : 6 + 112 * (number + 1)] for number in range(4)]
    assert all(len(np.unique(cell.reshape(-1, 3), axis=0)) > 2 for cell in cells)


def test_an_index_that_places_a_member_outside_its_sample_is_refused(shards: ShardSet, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards.folder, tmp_path / "set"))
    columns = parse_columns((folder / "index.npz").read_bytes())
    for name, value in (("offset.map.png", 1 << 40), ("length.map.png", 1 << 40), ("length.before.png", -1)):
        changed = {**columns, name: columns[name].copy()}
        changed[name][3] = value
        index = render_columns(changed)
        (folder / "index.npz").write_bytes(index)
        sealed = replace(shards.manifest, index_bytes=len(index), index_sha256=hashlib.sha256(index).hexdigest())
        (folder / "manifest.json").write_bytes(render_manifest(sealed))
        with pytest.raises(ValueError, match="rows that lie outside their shard"):
            open_shards(folder)
    hostile = replace(shards.manifest, members=["../map.png"])
    (folder / "manifest.json").write_bytes(render_manifest(hostile))
    with pytest.raises(ValueError, match=r"manifest\.json: members\.0: "):
        open_shards(folder)


# webdataset leaves the closing of its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_opens_the_maps(shards: ShardSet) -> None:
    urls = [str(path) for path in sorted(shards.folder.glob("*.tar"))]
    found = {sample["__key__"]: sample for sample in wds.WebDataset(urls, shardshuffle=False)}
    assert len(found) == 20
    for name in MEMBERS:
        assert {key: sample[name] for key, sample in found.items()} == members_of(shards.folder, name)
