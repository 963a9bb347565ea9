"""The strict tar reader on headers from hands that mean harm or err: an answer or a TarError, at once."""

import io
import re
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.shards.index import open_shards
from data_pipelines.shards.tar_scan import TarError, mapped, scan_members, scan_samples
from data_pipelines.shards.tar_write import END_OF_ARCHIVE, member
from data_pipelines.sources.ilsvrc import list_samples
from data_pipelines.upkeep.foreign import index_shards
from data_pipelines.upkeep.repair import repair_shards
from data_pipelines.upkeep.verify import verify_shards
from data_pipelines.writing.write import WriteConfig, write_shards
from tests.data.shard_sources import jpeg


def _sealed(header: bytes) -> bytes:
    """The header with the checksum that belongs to it."""
    total = sum(header) - sum(header[148:156]) + 8 * 32
    return header[:148] + b"%06o\0 " % total + header[156:]


def _with_field(start: int, value: bytes) -> bytes:
    """A tar of one member whose header has `value` at `start`."""
    tar = member("a.jpg", b"x" * 600) + END_OF_ARCHIVE
    return _sealed(tar[:start] + value + tar[start + len(value) : 512]) + tar[512:]


def _pax(record: bytes) -> bytes:
    info = tarfile.TarInfo("p")
    info.size, info.type = len(record), tarfile.XHDTYPE
    return (
        info.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % 512) + member("a.jpg", b"x") + END_OF_ARCHIVE
    )


def _line(key: bytes, value: bytes) -> bytes:
    size = len(key) + len(value) + 3
    size += len(str(size + len(str(size))))
    return b"%d %s=%s\n" % (size, key, value)


NUMBERS = (100, 108, 116, 136, 124)
NOT_DIGITS = (
    b"-0001000",
    b"+0001000",
    b"0o001000",
    b"0_001000",
    b"00 01000",
    b"\t0001000",
    b"0008000\0",
    b"0x10\0\0\0\0",
)


@pytest.mark.parametrize("start", NUMBERS)
@pytest.mark.parametrize("value", NOT_DIGITS)
def test_numbers_of_a_header_are_digits_only(start: int, value: bytes) -> None:
    with pytest.raises(TarError, match="not a tar header"):
        list(scan_members(memoryview(_with_field(start, value))))


@pytest.mark.parametrize("first", [0xFF, 0xC0, 0x81])
def test_binary_sizes_are_never_negative(first: int) -> None:
    value = bytes([first]) + b"\xff" * 10 + b"\x00"
    with pytest.raises(TarError, match="negative size"):
        list(scan_members(memoryview(_with_field(124, value))))
    [found] = scan_members(memoryview(_with_field(124, b"\x80" + (600).to_bytes(11, "big"))))
    assert found.size == 600


@pytest.mark.parametrize(
    "value", [b"-512", b"+1", b"1_0", b" 1", b"1 ", b"", b"0x1", b"\xc2\xb2", b"1e3", b"9" * 20, b"9" * 5000, b"1.5"]
)
def test_sizes_of_extended_headers_are_digits_only(value: bytes) -> None:
    with pytest.raises(TarError, match="a size of"):
        list(scan_members(memoryview(_pax(_line(b"size", value)))))


def test_sparse_files_and_global_sizes_are_refused() -> None:
    with pytest.raises(TarError, match="a sparse file"):
        list(scan_members(memoryview(_pax(_line(b"GNU.sparse.major", b"1")))))
    everywhere = bytearray(_pax(_line(b"size", b"1")))
    everywhere[156] = ord("g")
    with pytest.raises(TarError, match="sets size for all members"):
        list(scan_members(memoryview(_sealed(bytes(everywhere[:512])) + bytes(everywhere[512:]))))


@pytest.mark.timeout(60)
def test_an_extended_header_of_a_mebibyte_is_read_in_time_of_its_length() -> None:
    [found] = scan_members(memoryview(_pax(b"6 a=b\n" * 174_762)))
    assert found.name == "a.jpg"


_TAR = b"".join([member("a.jpg", b"x" * 700), member("a.cls", b"1"), member("k" * 150 + ".jpg", b"y"), END_OF_ARCHIVE])
# Bytes of headers, of the extended one's text, and of the end.
_PLACES = st.one_of(
    *(st.integers(start, start + 511) for start in (0, 1536, 2560, 3072, 3584, len(_TAR) - 1024, len(_TAR) - 512))
)
_CHANGES = st.lists(
    st.tuples(_PLACES, st.one_of(st.binary(min_size=1, max_size=12), st.sampled_from(NOT_DIGITS))), max_size=4
)


@settings(max_examples=300, deadline=2000)
@given(_CHANGES, st.booleans(), st.integers(0, len(_TAR)))
def test_mutated_headers_give_members_inside_the_tar_or_an_error(
    changes: list[tuple[int, bytes]], is_sealed: bool, cut: int
) -> None:
    tar = bytearray(_TAR)
    for place, value in changes:
        tar[place : place + len(value)] = value
    if is_sealed:
        for start in (0, 1536, 2560, 3584):
            tar[start : start + 512] = _sealed(bytes(tar[start : start + 512]))
    data = bytes(tar[: len(_TAR)])[: cut or None]
    tracemalloc.start()
    try:
        position = 0
        for found in scan_members(memoryview(data)):
            assert position <= found.start < found.offset <= found.offset + found.size <= found.end <= len(data)
            position = found.end
    except TarError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


def _samples(num: int = 4) -> bytes:
    return b"".join(member(f"img{n}.jpg", jpeg(n)) + member(f"img{n}.cls", b"%d" % (n % 2)) for n in range(num))


DAMAGED = {
    "two in one": ((_samples() + END_OF_ARCHIVE) * 2, "a second tar"),
    "garbage": (_samples() + END_OF_ARCHIVE + b"x" * 100, "other bytes"),
    "page": (_samples() + END_OF_ARCHIVE + b"<html>" * 200_000, "other bytes"),
    "half an end": (_samples() + END_OF_ARCHIVE[:512], "cut off inside the end-of-archive marker"),
    "no end": (_samples(), "cut off: no end-of-archive marker"),
    "cut": (_samples()[:-700], "cut off"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_wrong_at_the_end_is_said_by_scan_index_verify_and_repair(tmp_path: Path, name: str) -> None:
    content, reason = DAMAGED[name]
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "s.tar").write_bytes(content)
    with pytest.raises(TarError, match=reason), mapped(folder / "s.tar") as data:
        list(scan_members(data))
    with pytest.raises(ValueError, match=f"at offset .*{reason}"):
        index_shards(folder)
    with pytest.raises(ValueError, match=f"at offset .*{reason}"):
        write_shards(WriteConfig(kind="tars", source=folder), tmp_path / "t")
    # The same damage after the set was made: verify finds it, and repair gives a sound set of the good samples.
    (folder / "s.tar").write_bytes(_samples() + END_OF_ARCHIVE)
    index_shards(folder)
    (folder / "s.tar").write_bytes(content)
    assert verify_shards(folder)
    repair = repair_shards(folder, tmp_path / "mended")
    assert repair.manifest.num_samples == (3 if name == "cut" else 4) and verify_shards(tmp_path / "mended") == []


@pytest.mark.parametrize("place", ["outer", "inner"])
def test_bytes_behind_a_tar_of_ilsvrc_are_said(tmp_path: Path, place: str) -> None:
    inner = member("n01440764_1.JPEG", jpeg(1)) + END_OF_ARCHIVE
    outer = member("n01440764.tar", inner + b"\n" * (place == "inner")) + END_OF_ARCHIVE + b"\n" * (place == "outer")
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(outer)
    with pytest.raises(ValueError, match=r"data after the end-of-archive marker.*other bytes"):
        list_samples(tmp_path, "train")


STRANGERS = ("README", "._img0.jpg", "./._img0.cls", "d/._img0.cls", "__meta__", "__meta__/a.jpg", "__x__", ".DS_Store")


@pytest.mark.parametrize("name", STRANGERS)
def test_members_of_no_sample_are_passed_over_and_counted(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    directory = tarfile.TarInfo("d/")
    directory.type = tarfile.DIRTYPE
    stranger = member(name, b"\0\5\x16\7") + directory.tobuf()
    halves = member("b.cls", b"0") + stranger + member("b.jpg", jpeg(2))
    (folder / "s.tar").write_bytes(stranger + _samples(2) + stranger + halves + stranger + END_OF_ARCHIVE)
    counts: Counter[str] = Counter()
    with mapped(folder / "s.tar") as data:
        assert [sample.key for sample in scan_samples(data, counts)] == ["img0", "img1", "b"]
    assert counts == {name: 4}
    write_shards(WriteConfig(kind="tars", source=folder, seed=None), tmp_path / "written")
    index_shards(folder)
    said = f"passed over 4 members of the tars that belong to no sample, such as {name!r}"
    assert len(re.findall(re.escape(said), caplog.text)) == 2
    assert verify_shards(folder) == [] and verify_shards(tmp_path / "written") == []
    assert list(open_shards(folder).keys) == list(open_shards(tmp_path / "written").keys) == ["img0", "img1", "b"]
    data_of = bytearray((folder / "s.tar").read_bytes())
    data_of[int(open_shards(folder).offset[1]) + 5] ^= 1
    (folder / "s.tar").write_bytes(data_of)
    assert repair_shards(folder, tmp_path / "mended").num_dropped == 1


def test_long_attributes_of_a_file_are_passed_over(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (("a.jpg", jpeg(1)), ("a.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(content), {"SCHILY.xattr.user.note": "x" * 1_000_000}
            tar.addfile(info, io.BytesIO(content))
    (tmp_path / "s.tar").write_bytes(buffer.getvalue())
    assert index_shards(tmp_path).num_samples == 1 and np.array_equal(open_shards(tmp_path).label, [0])
