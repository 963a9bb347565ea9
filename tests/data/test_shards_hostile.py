"""Sets from hands that mean harm: rightly sealed, but with names, sizes and arrays that no writer of ours gives."""

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data_pipelines.writing.finish
from data_pipelines.config import DataConfig
from data_pipelines.remote.shard_sets import open_data
from data_pipelines.shards.index import COLUMNS, open_shards
from data_pipelines.shards.manifest import max_index_bytes
from data_pipelines.shards.npz_columns import parse_columns, render_columns
from data_pipelines.sources.tars import class_names_of
from data_pipelines.upkeep.sidecars import write_sidecars
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.cli import main
from tests.servers.stream_server import serve

SAMPLE = Path(__file__).parents[2] / "data_pipelines" / "sample" / "fashion_mnist"
HOSTILE_NAMES = (
    *("", ".", "..", ".tar", "/abs.tar", "../out.tar", "../../../.ssh/out.tar", "a/b.tar", "a/../../out.tar"),
    *("nul\0.tar", "manifest.json", "index.npz", "room.lock", "code.py", "shard-000000.tar.part"),
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "test"
    write_shards(WriteConfig(kind="idx", source=SAMPLE, split="test", shard_samples=700), folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def _seal(folder: Path, index: bytes | None = None, *, first: dict[str, Any] | None = None, **changes: Any) -> None:
    """The folder's manifest with these changes, those of its `first` shard too, sealed as a writer seals it."""
    fields = json.loads((folder / "manifest.json").read_bytes())
    if index is not None:
        (folder / "index.npz").write_bytes(index)
        fields |= {"index_bytes": len(index), "index_sha256": hashlib.sha256(index).hexdigest()}
    fields |= changes
    fields["shards"][0] |= first or {}
    lines = [f"{shard['hash']} {shard['bytes']} {shard['num_samples']}\n" for shard in fields["shards"]]
    content = "sret_scale shards 2\n" + "".join(lines) + json.dumps(fields["class_names"])
    fields["fingerprint"] = hashlib.sha256(content.encode()).hexdigest()
    del fields["sha256"]
    body = json.dumps(fields)[:-1] + ",\n"
    digest = hashlib.sha256(f'{body}"sha256": "{"0" * 64}"\n}}\n'.encode()).hexdigest()
    (folder / "manifest.json").write_text(f'{body}"sha256": "{digest}"\n}}\n')


def _open_locally(folder: Path, tmp_path: Path) -> None:
    open_shards(folder, check_tars=False)


def _open_remotely(folder: Path, tmp_path: Path) -> None:
    with serve(folder) as site:
        open_data(site.url, DataConfig(cache_folder=str(tmp_path / "cache"), stall_s=5.0, fetch_attempts=1))


def _open_file_url(folder: Path, tmp_path: Path) -> None:
    open_data(f"file://{folder}", DataConfig(cache_folder=str(tmp_path / "cache")))


def _as_source(folder: Path, tmp_path: Path) -> None:
    class_names_of(folder, [])


OPENERS = (_open_locally, _open_remotely, _open_file_url, _as_source)


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_shard_is_a_plain_name_wherever_a_manifest_is_read(
    folder: Path, tmp_path: Path, name: str, opener: Callable[[Path, Path], None]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    _seal(folder, first={"file": name})
    with pytest.raises(ValueError, match=r"manifest\.json: shards\.0\.file: expected"):
        opener(folder, tmp_path)
    # Nothing of it is kept.
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize(
    "changes",
    [
        {"num_samples": 1 << 40, "bytes": 1 << 47},
        {"num_samples": -1},
        {"num_samples": 1 << 70},
        {"num_samples": "700"},
        {"bytes": 1.5},
        {"end": -512},
        {"end": 1 << 40},
        {"hash": "md5:00"},
        {"hash": 5},
        {"file": "shard-000001.tar"},
        {"class_counts": "many"},
    ],
)
def test_a_shards_sizes_and_types_are_checked(
    folder: Path, tmp_path: Path, changes: dict[str, Any], opener: Callable[[Path, Path], None]
) -> None:
    _seal(folder, first=changes)
    with pytest.raises(ValueError, match=r"manifest\.json: ") as info:
        opener(folder, tmp_path)
    assert len(str(info.value)) < 500 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"index_bytes": 1 << 40},
        {"index_bytes": -1},
        {"index_sha256": "no"},
        {"num_rejected": "1"},
        {"writer": []},
        {"class_names": [["a"]]},
        {"class_names": {"a": 0}},
    ],
)
def test_the_manifests_fields_are_checked(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    _seal(folder, **changes)
    for opener in (_open_locally, _open_remotely):
        with pytest.raises(ValueError, match=r"manifest\.json: .*(index_|num_rejected|writer|class_names|an index of)"):
            opener(folder, tmp_path)
    assert not (tmp_path / "cache").exists()


def test_a_manifest_or_an_index_beyond_its_bound_is_not_read(folder: Path, tmp_path: Path) -> None:
    for name, most in (("index.npz", max_index_bytes(2000)), ("manifest.json", 64 * 2**20)):
        with (folder / name).open("r+b") as file:
            file.truncate(most + 1)
        for opener in (_open_locally, _open_remotely, _open_file_url):
            with pytest.raises(ValueError, match=f"{name}: (more than|[0-9,]* bytes)"):
                opener(folder, tmp_path)
    assert not (tmp_path / "cache").exists()


def test_what_readers_would_refuse_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = WriteConfig(kind="idx", source=SAMPLE, split="test", shard_samples=700)
    monkeypatch.setattr(data_pipelines.writing.finish, "MAX_JSON_BYTES", 500)
    with pytest.raises(ValueError, match=r"a manifest of .* make larger shards"):
        write_shards(config, tmp_path / "a")
    monkeypatch.undo()
    monkeypatch.setattr("data_pipelines.writing.write.max_index_bytes", lambda num_samples: 1000)
    with pytest.raises(ValueError, match=r"an index of .* at most 1,000"):
        write_shards(config, tmp_path / "b")
    assert not list(tmp_path.iterdir())


def _npz(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


_HUGE = _npy(np.zeros(3, np.int64)).replace(b"'shape': (3,), }            ", b"'shape': (3000000000000,), }")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x05\x06" + bytes(18),
        _npz([("offset.npy", bytes(1 << 20))], zipfile.ZIP_DEFLATED),
        _npz([("offset.npy", _HUGE)]),
        _npz([("offset.npy", _npy(np.zeros((2, 2), np.int64)))]),
        _npz([("offset.npy", _npy(np.array([object()])))]),
        _npz([("offset.npy", _npy(np.zeros(3, "S4")))]),
        _npz([("offset.npy", b"")]),
        _npz([("../offset.py", b"import os")]),
    ],
)
def test_an_index_of_other_arrays_is_refused(folder: Path, tmp_path: Path, content: bytes) -> None:
    assert b"3000000000000" in _HUGE
    _seal(folder, content)
    for opener in (_open_locally, _open_remotely):
        with pytest.raises(ValueError, match=r"index\.npz: "):
            opener(folder, tmp_path)
    assert not (tmp_path / "cache").exists()


def test_members_that_share_their_bytes_are_refused() -> None:
    content = bytearray(_npz([(f"a{number}.npy", _npy(np.zeros(1000, np.int64))) for number in range(9)]))
    one = content.index(b"PK\x01\x02")
    # Every entry of the list points at the first member, as in a bomb.
    entry = content[one : content.index(b"PK\x01\x02", one + 4)]
    assert len(parse_columns(bytes(content))) == 9
    content[content.index(b"PK\x03\x04", 4) : one] = b""
    tail = bytes(entry) * 9
    end = bytearray(content[content.index(b"PK\x05\x06") :])
    end[12:20] = len(tail).to_bytes(4, "little") + content.index(b"PK\x01\x02").to_bytes(4, "little")
    bomb = bytes(content[: content.index(b"PK\x01\x02")]) + tail + bytes(end)
    with pytest.raises(ValueError, match="larger than the file"):
        parse_columns(bomb)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("offset", (1 << 63) - 1),
        ("record_offset", (1 << 63) - 1),
        ("record_offset", -(1 << 63)),
        ("length", (1 << 63) - 1),
        ("key_end", -(1 << 63)),
        ("key_end", (1 << 63) - 1),
        ("record_offset", 0),
    ],
)
def test_rows_whose_sums_run_over_are_refused(folder: Path, name: str, values: int) -> None:
    columns = {key: value.copy() for key, value in parse_columns((folder / "index.npz").read_bytes()).items()}
    columns[name][5] = values
    _seal(folder, render_columns({key: columns[key] for key in COLUMNS}))
    with pytest.raises(ValueError, match="rows that lie outside"):
        open_shards(folder)


@pytest.mark.lengthy
def test_a_manifest_that_names_another_folder_makes_no_file_there(folder: Path, tmp_path: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    elsewhere = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    before = sorted(elsewhere.rglob("*"))
    _seal(folder, writer={**manifest["writer"], "location": str(elsewhere)})
    alone = ("--workers", "1")
    commands = (["sidecars", folder], ["repair", folder, tmp_path / "out", *alone], ["verify", folder, *alone])
    for command in (*commands, ["info", folder]):
        main(["shards", *map(str, command)])
    assert sorted(elsewhere.rglob("*")) == before
    with pytest.raises(ValueError, match="its tars lie in"):
        write_sidecars(folder, split="x")


@pytest.mark.parametrize(
    "location", ["relative", "..", 5, ["/tmp"], "", None, "pipe:touch x", "file:/etc", "\0", "/a\0b"]
)
def test_a_location_that_is_no_folder_and_no_url_is_refused(folder: Path, tmp_path: Path, location: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    _seal(folder, writer={**manifest["writer"], "location": location})
    for opener in (_open_locally, lambda at, _: open_data(at, DataConfig(cache_folder=str(tmp_path / "cache")))):
        with pytest.raises(
            ValueError, match=r"manifest\.json: writer: location: expected a folder from the root or a URL"
        ):
            opener(folder, tmp_path)


def test_columns_come_back_as_they_were() -> None:
    columns = {"a": np.arange(5, dtype="<i4"), "empty": np.zeros(0, "<i8"), "b": np.array([7], "|u1")}
    back = parse_columns(render_columns(columns))
    assert list(back) == list(columns) and not back["a"].flags.writeable
    assert all(np.array_equal(back[name], value) and back[name].dtype == value.dtype for name, value in columns.items())


def test_a_damaged_index_in_the_cache_is_fetched_again(folder: Path, tmp_path: Path) -> None:
    _open_remotely(folder, tmp_path)
    [kept] = (tmp_path / "cache").glob("*/index.npz")
    kept.write_bytes(kept.read_bytes()[:-100])
    _open_remotely(folder, tmp_path)
    assert kept.read_bytes() == (folder / "index.npz").read_bytes()


def test_the_command_says_it_in_a_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _seal(folder, first={"file": "../\x1b[31m.tar"})
    assert main(["shards", "info", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "\x1b" not in error and len(error.splitlines()) == 1
