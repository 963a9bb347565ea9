"""Opening shard sets: what is missing, cut off, changed or of another set is refused with what to do."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.index import COLUMNS, open_shards, render_index
from data_pipelines.manifest import Manifest, ShardEntry, content_fingerprint, read_manifest, render_manifest
from data_pipelines.write import WriteConfig, write_shards

SAMPLE = Path(__file__).parent.parent / "data_pipelines" / "sample" / "fashion_mnist"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "test"
    write_shards(WriteConfig(kind="idx", source=SAMPLE, split="test", shard_samples=700), folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such shard folder"):
        open_shards(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json, so not a shard set"):
        open_shards(tmp_path)


@pytest.mark.parametrize("name", ["index.npz", "shard-000001.tar"])
def test_a_missing_part(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}.*missing"):
        open_shards(folder)


def test_tars_without_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="tars without manifest"):
        open_shards(folder)


@pytest.mark.parametrize("kept", [0, 1000, 512 * 6])
def test_a_truncated_shard(folder: Path, kept: int) -> None:
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"shard-000001\.tar: cut off, {kept:,} bytes, expected"):
        open_shards(folder)


@pytest.mark.parametrize("name", ["index.npz", "manifest.json"])
def test_every_flipped_bit_of_index_and_manifest_is_seen(folder: Path, name: str) -> None:
    path = folder / name
    data = path.read_bytes()
    positions = np.random.default_rng(0).integers(0, len(data), 60)
    for number, position in enumerate(positions.tolist()):
        changed = bytearray(data)
        changed[position] ^= 1 << number % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=str(name)):
            open_shards(folder)
    path.write_bytes(data)
    open_shards(folder)


def test_the_index_of_other_shards(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_shards(WriteConfig(kind="idx", source=SAMPLE, split="test", shard_samples=700, seed=1), other)
    shutil.copy(other / "index.npz", folder)
    with pytest.raises(ValueError, match="of other shards"):
        open_shards(folder)


def test_rows_outside_their_shard_are_refused(folder: Path) -> None:
    shards = open_shards(folder)
    manifest = read_manifest(folder)
    columns = {name: getattr(shards, name).copy() for name in COLUMNS if not name.startswith("key_")}
    columns |= {"key_end": shards.keys.ends, "key_bytes": shards.keys.blob}
    for name, value in (("offset", 1 << 40), ("label", 10), ("label", -1), ("length", -5), ("shard_of", 1)):
        changed = {**columns, name: columns[name].copy()}
        changed[name][3] = value
        _write_set(folder, manifest, render_index(changed))
        expected = f"label {value} of sample 3 is outside" if name == "label" else "rows that lie outside"
        with pytest.raises(ValueError, match=expected):
            open_shards(folder)


def test_a_million_samples_open_in_under_a_second(tmp_path: Path) -> None:
    num_shards, per_shard = 100, 12_812
    num_samples = num_shards * per_shard
    rows = np.arange(num_samples, dtype=np.int64)
    columns = {name: np.zeros(num_samples, kind) for name, kind in COLUMNS.items()}
    columns["shard_of"] = (rows // per_shard).astype(np.int32)
    columns["offset"] = (rows % per_shard) * 1024 + 512
    columns["record_offset"] = (rows % per_shard) * 1024
    columns["length"] += 100
    columns["key_end"] = (rows + 1) * 15
    columns["key_bytes"] = np.full(num_samples * 15, ord("n"), np.uint8)
    counts = [per_shard, *[0] * 999]
    entries = []
    for number in range(num_shards):
        name = f"shard-{number:06d}.tar"
        with (tmp_path / name).open("wb") as file:
            file.truncate(per_shard * 1024 + 1024)
        entry = ShardEntry(
            file=name,
            bytes=per_shard * 1024 + 1024,
            sha256="0" * 64,
            end=per_shard * 1024,
            num_samples=per_shard,
            class_counts=counts,
        )
        entries.append(entry)
    names = [f"class {number}" for number in range(1000)]
    fingerprint = content_fingerprint(entries, names)
    manifest = Manifest(
        class_names=names,
        fingerprint=fingerprint,
        index_bytes=0,
        index_sha256="",
        shards=entries,
        num_rejected=0,
        writer={},
    )
    _write_set(tmp_path, manifest, render_index(columns))
    # Of three tries, as other work on the machine may interrupt one.
    times_s = []
    for _ in range(3):
        start = time.perf_counter()
        shards = open_shards(tmp_path)
        times_s.append(time.perf_counter() - start)
    assert shards.num_samples == num_samples and shards.key(num_samples - 1) == "n" * 15
    assert min(times_s) < 1.0


def _write_set(folder: Path, manifest: Manifest, index: bytes) -> None:
    """Index and manifest that belong together, whatever the index says."""
    import dataclasses
    import hashlib

    (folder / "index.npz").write_bytes(index)
    digest = hashlib.sha256(index).hexdigest()
    changed = dataclasses.replace(manifest, index_bytes=len(index), index_sha256=digest)
    (folder / "manifest.json").write_bytes(render_manifest(changed))
