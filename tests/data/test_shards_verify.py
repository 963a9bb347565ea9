"""What verify finds: every flipped bit, cuts, foreign members, broken images; and what it says of them."""

import io
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.shards.index import open_shards
from data_pipelines.shards.tar_scan import TarError, scan_members, scan_samples, split_name
from data_pipelines.shards.tar_write import END_OF_ARCHIVE, make_record, member, safe_key
from data_pipelines.upkeep.verify import verify_shard, verify_shards
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.cli import main

SAMPLE = Path(__file__).parents[2] / "data_pipelines" / "sample" / "fashion_mnist"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "test"
    write_shards(WriteConfig(kind="idx", source=SAMPLE, split="test", shard_samples=200), folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


@pytest.mark.multi_process
def test_a_sound_set_has_no_findings(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_shards(original) == []
    assert main(["shards", "verify", str(original), "--workers", "2"]) == 0
    assert capsys.readouterr().out == f"{original}: intact\n"


@pytest.mark.lengthy
def test_100_of_100_flipped_bits_are_found_with_their_sample(folder: Path) -> None:
    shards = open_shards(folder)
    rng = np.random.default_rng(0)
    for number in range(100):
        # Every tenth lies in the end-of-archive marker, where no sample is.
        path = folder / shards.shard_names[number % shards.num_shards]
        data = path.read_bytes()
        position = len(data) - 1 - int(rng.integers(0, 1024)) if number % 10 == 9 else int(rng.integers(0, len(data)))
        changed = bytearray(data)
        changed[position] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(changed)
        findings = verify_shard(shards, number % shards.num_shards, decode=False).findings
        path.write_bytes(data)
        assert len(findings) == 1
        assert findings[0].shard == path.name
        if position < shards.manifest.shards[number % shards.num_shards].end:
            rows = np.flatnonzero(shards.shard_of == number % shards.num_shards)
            row = int(rows[np.searchsorted(shards.record_offset[rows], position, side="right") - 1])
            assert findings[0].key == shards.key(row)
            assert findings[0].offset in (shards.offset[row], shards.record_offset[row])
        else:
            assert findings[0].reason == "the end of the shard has changed"


def test_the_command_reports_and_exits_with_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = open_shards(folder)
    path = folder / shards.shard_names[0]
    data = bytearray(path.read_bytes())
    data[int(shards.offset[7]) + 50] ^= 4
    path.write_bytes(data)
    assert main(["shards", "verify", str(folder), "--workers", "1"]) == 1
    out = capsys.readouterr().out.splitlines()
    offset = int(shards.offset[7])
    assert out == [
        f"shard-000000.tar: sample {shards.key(7)!r} at offset {offset}: the image's bytes have changed",
        f"{folder}: damaged, 1 found",
    ]


@pytest.mark.lengthy
@pytest.mark.parametrize("row", [0, 57, 199])
@pytest.mark.parametrize("inside", [0, 100])
def test_a_cut_inside_and_exactly_at_a_member(folder: Path, row: int, inside: int) -> None:
    shards = open_shards(folder)
    path = folder / shards.shard_names[0]
    cut = int(shards.record_offset[row]) + inside
    path.write_bytes(path.read_bytes()[:cut])
    findings = verify_shards(folder, decode=False)
    assert [(finding.shard, finding.key, finding.offset) for finding in findings] == [(path.name, shards.key(row), cut)]
    assert f"cut off, {200 - row} samples lost" in findings[0].reason


def test_missing_and_swapped_shards(folder: Path) -> None:
    (folder / "shard-000002.tar").unlink()
    first, second = folder / "shard-000000.tar", folder / "shard-000001.tar"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    findings = verify_shards(folder, decode=False)
    assert {finding.shard for finding in findings} == {"shard-000000.tar", "shard-000001.tar", "shard-000002.tar"}


@pytest.mark.parametrize(
    ("tar", "offset", "reason"),
    [
        (b"\x1f\x8b" + bytes(2000), 0, "is gzip, not tar"),
        (member("a.jpg", b"x") + member("a.cls", b"1"), 2048, "cut off: no end-of-archive"),
        (member("a.jpg", b"x")[:512], 0, "cut off: a member of 1 bytes, 0 are there"),
        (member("../a.jpg", b"x") + END_OF_ARCHIVE, 0, "leads out of the folder"),
        (member("/a.jpg", b"x") + END_OF_ARCHIVE, 0, "leads out of the folder"),
        (member("a.jpg", b"x") + END_OF_ARCHIVE[:512], 1024, "cut off inside the end-of-archive"),
        (member("a.jpg", b"x") + END_OF_ARCHIVE + b"y", 1024, "data after the end-of-archive"),
        (b"\x01" * 1024, 0, "not a tar header"),
        (bytearray(b"A") + member("a.jpg", b"x")[1:] + END_OF_ARCHIVE, 0, "the checksum of a tar header is wrong"),
    ],
)
def test_tars_that_are_not_sound(tar: bytes, offset: int, reason: str) -> None:
    with pytest.raises(TarError, match=reason) as caught:
        list(scan_members(memoryview(tar)))
    assert caught.value.offset == offset


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(kind: bytes) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    with pytest.raises(TarError, match="link, device"):
        list(scan_members(memoryview(info.tobuf() + END_OF_ARCHIVE)))


def test_duplicate_members_of_a_sample_are_refused() -> None:
    tar = member("a.jpg", b"x") + member("a.jpg", b"y") + END_OF_ARCHIVE
    with pytest.raises(TarError, match=r"two members 'a\.jpg'"):
        list(scan_samples(memoryview(tar)))


NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=150).filter(
    lambda name: name not in (".", "..")
)


@settings(max_examples=50, deadline=None)
@given(st.lists(NAMES, max_size=4), st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]), st.data())
def test_the_scanner_agrees_with_tarfile(names: list[str], tar_format: int, data: st.DataObject) -> None:
    contents = [data.draw(st.binary(max_size=1100)) for _ in names]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, content in zip(names, contents, strict=True):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    view = memoryview(buffer.getvalue())
    found = [(item.name, bytes(view[item.offset : item.offset + item.size])) for item in scan_members(view)]
    assert found == list(zip(names, contents, strict=True))


@settings(max_examples=50, deadline=None)
@given(NAMES, NAMES)
def test_safe_keys_are_unique_and_survive_webdataset(name: str, other: str) -> None:
    key = safe_key(f"{other}/{name}")
    assert key.isascii() and not set(key) & set(" '\"\n.")
    assert split_name(f"{key}.jpg") == (key, "jpg")
    assert (safe_key(name) == safe_key(other)) == (name == other)


@settings(max_examples=50, deadline=None)
@given(st.text("abc/%_. ", min_size=1, max_size=120), st.integers(0, 3000))
def test_members_are_as_tarfile_writes_them(name: str, num_bytes: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = num_bytes
    content = b"x" * num_bytes
    assert member(name, content) == info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-num_bytes % 512)


@settings(max_examples=30, deadline=None)
@given(NAMES, st.binary(min_size=1, max_size=2000), st.integers(0, 999))
def test_records_are_tar_and_point_at_their_image(name: str, image: bytes, label: int) -> None:
    key = safe_key(name)
    record = make_record(key, "jpg", image, label, b"{}", {"map.png": b"labels"})
    data = record.before + record.image + record.after
    assert (record.image, record.image_crc, record.num_bytes) == (image, zlib.crc32(image), len(data))
    [sample] = scan_samples(memoryview(data + END_OF_ARCHIVE))
    assert sample.key == key and set(sample.members) == {"jpg", "map.png", "cls", "json"}
    part = sample.members["map.png"]
    assert record.members == {"map.png": (part.offset, part.size, zlib.crc32(b"labels"))}
    assert sample.members["jpg"].offset == len(record.before)
