"""Opening shard sets: what is missing, cut off, changed or of another set is refused with what to do."""

import hashlib
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from data_pipelines.shards.index import COLUMNS, open_shards, render_index
from data_pipelines.shards.manifest import Manifest, ShardEntry, content_fingerprint, read_manifest, render_manifest
from data_pipelines.upkeep.verify import verify_shards
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.cli import main

SAMPLE = Path(__file__).parents[2] / "data_pipelines" / "sample" / "fashion_mnist"


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


@pytest.mark.lengthy
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
            hash="xxh3_128:" + "0" * 32,
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
    # Processor time, and of three tries: other work on the machine may interrupt one.
    times_s = []
    for _ in range(3):
        start = time.process_time()
        shards = open_shards(tmp_path)
        times_s.append(time.process_time() - start)
    assert shards.num_samples == num_samples and shards.key(num_samples - 1) == "n" * 15
    assert min(times_s) < 1.0


def test_sets_of_version_1_are_read(folder: Path) -> None:
    manifest = read_manifest(folder)
    hashes = [hashlib.sha256((folder / shard.file).read_bytes()).hexdigest() for shard in manifest.shards]
    lines = [f"{tar} {shard.bytes} {shard.num_samples}\n" for tar, shard in zip(hashes, manifest.shards, strict=True)]
    content = "sret_scale shards 1\n" + "".join(lines) + json.dumps(manifest.class_names)
    text = render_manifest(replace(manifest, fingerprint=hashlib.sha256(content.encode()).hexdigest())).decode()
    text = text.replace('"version": 2', '"version": 1')
    for shard, tar in zip(manifest.shards, hashes, strict=True):
        text = text.replace(f'"hash": "{shard.hash}"', f'"sha256": "{tar}"')
    body = text[: text.rindex('"sha256"')]
    zeros = f'"sha256": "{"0" * 64}"\n}}\n'
    seal = hashlib.sha256((body + zeros).encode()).hexdigest()
    (folder / "manifest.json").write_text(body + zeros.replace("0" * 64, seal))
    shards = open_shards(folder)
    assert shards.manifest.shards[0].hash == f"sha256:{hashes[0]}" and shards.fingerprint != manifest.fingerprint
    assert verify_shards(folder, decode=False) == []
    # The set is complete, whatever its hashes, and is left as it is.
    write_shards(WriteConfig(kind="idx", source=SAMPLE, split="test", shard_samples=700), folder)
    assert read_manifest(folder).fingerprint == shards.fingerprint


def test_another_version_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"version": 2', b'"version": 4'))
    with pytest.raises(ValueError, match=r"expected format 'sret_scale shards' of version 1 to 3, got .* of version 4"):
        open_shards(folder)


def test_the_hash_of_the_tars_can_be_chosen(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["shards", "write", "idx", str(SAMPLE), str(tmp_path / "strong"), "--split", "test"]
    assert main([*command, "--shard-samples", "700", "--workers", "1", "--hash", "sha256"]) == 0
    tar = (tmp_path / "strong" / "shard-000000.tar").read_bytes()
    assert tar == (folder / "shard-000000.tar").read_bytes()
    strong, fast = read_manifest(tmp_path / "strong"), read_manifest(folder)
    assert strong.shards[0].hash == f"sha256:{hashlib.sha256(tar).hexdigest()}"
    assert fast.shards[0].hash == f"xxh3_128:{xxhash.xxh3_128(tar).hexdigest()}"
    assert verify_shards(tmp_path / "strong", decode=False) == []
    with pytest.raises(ValueError, match="made with another hash; choose another target"):
        write_shards(
            WriteConfig(kind="idx", source=SAMPLE, split="test", shard_samples=700, hash_name="sha256"), folder
        )
    with pytest.raises(ValueError, match="hash 'md5': expected one of xxh3_128, sha256"):
        WriteConfig(kind="idx", source=SAMPLE, hash_name="md5")


def _write_set(folder: Path, manifest: Manifest, index: bytes) -> None:
    """Index and manifest that belong together, whatever the index says."""
    (folder / "index.npz").write_bytes(index)
    digest = hashlib.sha256(index).hexdigest()
    changed = replace(manifest, index_bytes=len(index), index_sha256=digest)
    (folder / "manifest.json").write_bytes(render_manifest(changed))
