"""Index of foreign shards, repair, sidecars and pictures; other readers open the same shards."""

import json
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from data_pipelines.shards.index import open_shards
from data_pipelines.upkeep.contact_sheet import draw_contact_sheet
from data_pipelines.upkeep.foreign import index_shards
from data_pipelines.upkeep.repair import repair_shards
from data_pipelines.upkeep.sidecars import write_sidecars
from data_pipelines.upkeep.verify import verify_shards
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.cli import main
from tests.data.shard_sources import encoded, jpeg, make_tar, make_tree, members_of, pixels
from tests.data.test_shards_write import UNCLOSED


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(WriteConfig(kind="folder", source=make_tree(folder / "tree"), shard_samples=9), folder / "set")
    return folder / "set"


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def damage(folder: Path, rows: list[int]) -> None:
    """Flips a bit in the middle of the image of each of `rows`."""
    shards = open_shards(folder, check_tars=False)
    for row in rows:
        path = folder / shards.shard_names[shards.shard_of[row]]
        data = bytearray(path.read_bytes())
        data[int(shards.offset[row] + shards.length[row] // 2)] ^= 16
        path.write_bytes(data)


@pytest.mark.multi_process
@UNCLOSED
def test_shards_of_webdatasets_own_writer_are_indexed(tmp_path: Path) -> None:
    pattern = str(tmp_path / "other-%04d.tar")
    with wds.ShardWriter(pattern, maxcount=4, verbose=0) as writer:
        for number in range(10):
            writer.write({"__key__": f"sample{number:03d}", "jpg": jpeg(number), "cls": number % 3, "json": {"a": 1}})
    manifest = index_shards(tmp_path, num_workers=2)
    assert manifest.num_samples == 10 and manifest.class_names == ["0", "1", "2"]
    assert verify_shards(tmp_path) == []
    shards = open_shards(tmp_path)
    assert [shards.key(row) for row in range(10)] == [f"sample{number:03d}" for number in range(10)]
    assert shards.label.tolist() == [number % 3 for number in range(10)]
    with pytest.raises(ValueError, match="has a manifest or a plan already"):
        index_shards(tmp_path)


def test_the_index_of_our_own_tars_is_the_one_that_was_written(folder: Path) -> None:
    index = (folder / "index.npz").read_bytes()
    before = open_shards(folder)
    (folder / "manifest.json").unlink()
    (folder / "classes.txt").write_text("\n".join(before.class_names))
    index_shards(folder)
    assert (folder / "index.npz").read_bytes() == index
    assert open_shards(folder).fingerprint == before.fingerprint


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jpg": b"", "a.cls": b"0"}, r"at offset 512: sample 'a': empty file"),
        ({"a.jpg": jpeg(1), "a.cls": b"cat"}, "expected a whole number"),
        ({"b.txt": b"x", "b.cls": b"0"}, "has 0 images"),
    ],
)
def test_foreign_shards_that_training_could_not_read(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    make_tar(tmp_path / "x.tar", files)
    with pytest.raises(ValueError, match=message):
        index_shards(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_foreign_shards_cut_at_a_member_or_packed(folder: Path) -> None:
    shards = open_shards(folder)
    (folder / "manifest.json").unlink()
    path = folder / shards.shard_names[1]
    data = path.read_bytes()
    row = int(np.flatnonzero(shards.shard_of == 1)[3])
    path.write_bytes(data[: int(shards.record_offset[row])])
    with pytest.raises(ValueError, match=rf"at offset {int(shards.record_offset[row])}: cut off: no end-of-archive"):
        index_shards(folder)
    path.write_bytes(b"\x1f\x8b\x08\x00" + data)
    with pytest.raises(ValueError, match="is gzip, not tar"):
        index_shards(folder)


def test_duplicate_keys_of_foreign_shards_are_reported(tmp_path: Path) -> None:
    for name, number in (("a.tar", 1), ("b.tar", 2)):
        make_tar(tmp_path / name, {"same.jpg": jpeg(number), "same.cls": b"0"})
    index_shards(tmp_path)
    [finding] = verify_shards(tmp_path)
    assert (finding.shard, finding.key, finding.reason) == ("b.tar", "same", "duplicate key, also in a.tar at offset 0")


def test_repair_leaves_out_what_is_bad(folder: Path, tmp_path: Path) -> None:
    damage(folder, [2, 11])
    repair = repair_shards(folder, tmp_path / "good", shard_samples=9)
    assert (repair.num_replaced, repair.num_dropped, repair.manifest.num_samples) == (0, 2, 22)
    assert verify_shards(tmp_path / "good") == []
    before = open_shards(folder)
    kept = [key for row, key in enumerate(before.keys) if row not in (2, 11)]
    assert list(open_shards(tmp_path / "good").keys) == kept
    # The metadata still says where each image once came from.
    metadata = members_of(tmp_path / "good", "json")
    assert metadata == {key: text for key, text in members_of(folder, "json").items() if key in kept}
    assert json.loads(metadata[kept[0]])["source"] == f"{kept[0]}.JPEG"


def test_repair_takes_good_copies(folder: Path, original: Path, tmp_path: Path) -> None:
    damage(folder, [2, 11, 23])
    spare = Path(shutil.copytree(original, tmp_path / "spare"))
    damage(spare, [11])
    (folder / open_shards(folder).shard_names[1]).unlink()
    repair = repair_shards(folder, tmp_path / "good", copy=spare)
    rows_of_shard = int((open_shards(original).shard_of == 1).sum())
    assert (repair.num_replaced, repair.num_dropped) == (2 + rows_of_shard - 1, 1)
    assert verify_shards(tmp_path / "good") == []
    good, first = open_shards(tmp_path / "good"), open_shards(original)
    keys = list(first.keys)
    del keys[11]
    assert list(good.keys) == keys
    assert np.array_equal(good.crc, np.delete(first.crc, 11))


def test_a_sound_set_needs_no_repair(original: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to repair"):
        repair_shards(original, tmp_path / "good")


@UNCLOSED
def test_timm_reads_the_shards(folder: Path) -> None:
    import_module("data_pipelines.image.torchvision_door")  # makes torchvision importable, which timm needs

    write_sidecars(folder, split="train")
    from timm.data.readers.reader_wds import ReaderWds

    shards = open_shards(folder)
    reader = ReaderWds(str(folder), split="train", is_training=False)
    samples = list(reader)
    assert len(samples) == shards.num_samples == reader.num_samples
    assert [target for _, target in samples] == shards.label.tolist()
    assert samples[0][0].size == (24, 20)


@pytest.mark.multi_process
def test_sidecars_say_what_the_shards_hold(folder: Path, tmp_path: Path) -> None:
    names = {path.name for path in write_sidecars(folder, split="val")}
    shards = open_shards(folder)
    assert names == {"sizes.json", "_info.json", "wids.json", *(f"shard-{n:06d}.idx" for n in range(shards.num_shards))}
    counts = {entry.file: entry.num_samples for entry in shards.manifest.shards}
    assert json.loads((folder / "sizes.json").read_text()) == counts
    assert json.loads((folder / "_info.json").read_text())["splits"]["val"]["num_samples"] == shards.num_samples
    for entry in json.loads((folder / "wids.json").read_text())["shardlist"]:
        path = folder / entry["url"]
        md5 = subprocess.run(["md5sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
        assert (entry["nsamples"], entry["filesize"], entry["md5sum"]) == (counts[path.name], path.stat().st_size, md5)
    lines = (folder / "shard-000000.idx").read_text().splitlines()
    assert lines[0] == f"v1.2 {counts['shard-000000.tar']}"
    data = (folder / "shard-000000.tar").read_bytes()
    ending, offset, size, name = lines[1].split(" ")[:4]
    assert (ending, name) == ("jpg", f"{shards.key(0)}.jpg")
    assert data[int(offset) :][: int(size)].startswith(b"\xff\xd8")
    # The extra files are no part of the set and do not disturb it.
    assert verify_shards(folder) == []


def test_the_contact_sheet_shows_the_images(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = np.asarray(draw_contact_sheet(original, num_images=6))
    assert sheet.std() > 20
    assert main(["shards", "head", str(original), str(tmp_path / "head.png"), "--count", "1", "--from", "23"]) == 0
    with Image.open(tmp_path / "head.png") as image:
        assert image.size == (2 * 6 + 112, 2 * 6 + 112 + 14)
    with pytest.raises(ValueError, match="no images 24 to"):
        draw_contact_sheet(original, first=24)


def test_info_counts(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "info", str(original), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["samples"] == 24 and set(facts["class_counts"].values()) == {8}
    assert facts["width"] == {"smallest": 24, "median": 24, "largest": 24}
    assert main(["shards", "info", str(original)]) == 0
    assert "samples      24" in capsys.readouterr().out


def test_the_other_commands_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "sidecars", str(folder)]) == 0
    damage(folder, [0])
    assert main(["shards", "repair", str(folder), str(tmp_path / "good"), "--workers", "1"]) == 0
    assert "23 samples; 0 bad ones were replaced, 1 left out" in capsys.readouterr().out
    make_tar(tmp_path / "x.tar", {"a.png": encoded(pixels(1), "PNG"), "a.cls": b"0"})
    assert main(["shards", "index", str(tmp_path)]) == 0
    assert "1 samples of 1 classes in 1 shards" in capsys.readouterr().out
