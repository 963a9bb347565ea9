"""What training meets in the field: each is replaced, counted and recorded, and every rank keeps its number of rows."""

import io
import json
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.shards.index import open_shards
from data_pipelines.stream.loader import DataConfig, LoaderState, TrainLoader
from data_pipelines.stream.order import Order
from data_pipelines.upkeep.foreign import index_shards
from sret_scale.cli import main
from tests.data.shard_sources import make_tar
from tests.data.stream_shards import TarShards, encoded, grey_level_shards, jpeg, smooth_image
from tests.reference.order import epoch_batches

PIXELS = smooth_image(20, 24, 0)


def _jpeg_of_size(height: int, width: int) -> bytes:
    """A JPEG whose header says so."""
    data = bytearray(jpeg(PIXELS))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


def _png_without_width() -> bytes:
    data = bytearray(encoded(PIXELS, "PNG"))
    data[16:20] = bytes(4)
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def _animation() -> bytes:
    stream = io.BytesIO()
    frames = [Image.fromarray(smooth_image(8, 8, seed)) for seed in (1, 2)]
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    return stream.getvalue()


# Sample -> its bytes, and what the quarantine file says.
BAD = {
    3: (b"", "empty image"),
    7: (b"no image at all", "not an image, or its header is broken"),
    12: (jpeg(PIXELS)[:-40], "not a readable image: image file is truncated"),
    18: (_jpeg_of_size(0, 24), "not an image, or its header is broken"),
    19: (_png_without_width(), "not an image, or its header is broken|image of 0 x 20 pixels"),
    25: (_jpeg_of_size(30_000, 30_000), "image of 30000 x 30000 pixels, larger than the limit"),
    31: (_animation(), "animated image"),
}


def _loader(shards: TarShards, *, rank: int = 0, world_size: int = 1, micro: int = 5, **fields: Any) -> TrainLoader:
    return TrainLoader(
        shards,  # type: ignore[arg-type]
        DataConfig(**{"workers": 2, "prefetch_batches": 1, "eval_crop_rate": 1.0, **fields}),
        image_size=8,
        seed=1,
        rank=rank,
        world_size=world_size,
        micro_batch_size=micro,
        grad_accum_steps=1,
    )


def _epoch(loader: TrainLoader) -> list[list[int]]:
    steps = loader.steps(LoaderState())
    batches = [step.micro_batches[0].indices.tolist() for step in islice(steps, loader.steps_per_epoch)]
    steps.close()
    return batches


@pytest.mark.parametrize("crop", ["resized", "centre"])
def test_bad_images_are_replaced_and_every_rank_keeps_its_rows(tmp_path: Path, crop: str) -> None:
    images = [BAD[i][0] if i in BAD else jpeg(PIXELS) for i in range(40)]
    shards = TarShards(tmp_path / "set", images, [0] * 40)
    file = tmp_path / "quarantine.jsonl"
    options: dict[str, Any] = {"crop": crop, "max_bad_rate": 0.5, "quarantine_file": str(file)}
    ranks = [_epoch(_loader(shards, rank=rank, world_size=2, **options)) for rank in range(2)]
    assert [[len(batch) for batch in batches] for batches in ranks] == [[5] * 4] * 2
    assert not {index for batches in ranks for batch in batches for index in batch} & set(BAD)
    records = [record for record in map(json.loads, file.read_text().splitlines()) if record["epoch"] == 0]
    assert {record["index"] for record in records} == set(BAD)
    for record in records:
        index = record["index"]
        assert (record["shard"], record["key"]) == (shards.shard_names[index // 16], shards.key(index))
        assert record["offset"] == int(shards.offset[index])
        assert any(part in record["reason"] for part in BAD[index][1].split("|")), record


@pytest.mark.parametrize("what", ["disappears", "is cut", "changes"])
def test_a_shard_that_goes_wrong_during_the_epoch_is_bad_samples(tmp_path: Path, what: str) -> None:
    shards = grey_level_shards(tmp_path / "set", 60, shard_size=10)
    file = tmp_path / "quarantine.jsonl"
    options: dict[str, Any] = {"order": "sequential", "max_bad_rate": 0.3, "quarantine_file": str(file)}
    loader = _loader(shards, **options)
    steps = loader.steps(LoaderState())
    seen = [next(steps).micro_batches[0].indices.tolist()]
    path = shards.folder / shards.shard_names[4]
    content = path.read_bytes()
    if what == "disappears":
        path.unlink()
    else:
        path.write_bytes(content[:530] if what == "is cut" else content.replace(b"IDAT", b"IDAX"))
    seen += [step.micro_batches[0].indices.tolist() for step in islice(steps, loader.steps_per_epoch - 1)]
    steps.close()
    assert [len(batch) for batch in seen] == [5] * 12 and not {i for batch in seen for i in batch} & set(range(40, 50))
    records = [record for record in map(json.loads, file.read_text().splitlines()) if record["epoch"] == 0]
    assert {(record["shard"], record["index"]) for record in records} == {(path.name, i) for i in range(40, 50)}
    reasons = {
        "disappears": "cannot read the shard",
        "is cut": "the shard ends after",
        "changes": "the bytes have changed",
    }
    assert all(reasons[what] in record["reason"] for record in records)


@pytest.mark.parametrize("order", ["full", "block", "sequential"])
def test_more_ranks_and_workers_than_shards_or_rows(tmp_path: Path, order: str) -> None:
    """One shard of 13 samples, 12 ranks of 8 workers each."""
    shards = grey_level_shards(tmp_path / "set", 13)
    options: dict[str, Any] = {"order": order, "workers": 8, "last": "pad"}
    ranks = [_epoch(_loader(shards, rank=rank, world_size=12, micro=1, **options)) for rank in range(12)]
    assert {len(batches) for batches in ranks} == {2}
    batches = [[index for rank in ranks for index in rank[step]] for step in range(2)]
    config = DataConfig(order=order)  # type: ignore[arg-type]
    whole = Order.of(shards.as_set(), config, seed=1, global_batch_size=12)
    assert batches == epoch_batches(whole.samples(0, np.arange(13)).tolist(), 12, "pad")
    assert {index for batch in batches for index in batch} == set(range(13))


@pytest.mark.slow
def test_more_processes_than_rows(tmp_path: Path) -> None:
    shards = grey_level_shards(tmp_path / "set", 5)
    options: dict[str, Any] = {"micro": 1, "last": "pad"}
    threads = _epoch(_loader(shards, **options))
    assert _epoch(_loader(shards, worker_kind="processes", **{**options, "workers": 2})) == threads


@pytest.mark.parametrize("kind", ["full", "block", "sequential"])
def test_a_state_is_small_at_its_largest(kind: str) -> None:
    order = Order(
        kind=kind,  # type: ignore[arg-type]
        fingerprint="ab" * 32,
        seed=2**63 - 1,
        shard_sizes=[10] * 200,
        global_batch_size=1 << 20,
        block_window=1 << 20,
        num_repeats=16,
        part_sizes=(20,) * 100,
        part_weights=tuple(np.linspace(0.123456, 9.87654, 100).tolist()),
    )
    state = LoaderState(
        epoch=10**6, position=10**12, fingerprint=order.fingerprint[:32], seed=order.seed, order=order.name
    )
    assert len(state.to_json()) < 200 and LoaderState.from_json(state.to_json()) == state
    # Names that differ stay different.
    other = Order(**{**vars(order), "part_weights": (1.0,) * 100})
    assert other.name != order.name


@pytest.mark.parametrize("index", BAD)
def test_bad_images_of_foreign_shards_are_named(tmp_path: Path, index: int, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command that makes the index where the header is broken, otherwise by verify."""
    data, reasons = BAD[index]
    files = {"good.jpg": jpeg(PIXELS), "good.cls": b"0", "odd.jpg": data, "odd.cls": b"0"}
    make_tar(tmp_path / "some.tar", files)
    if index != 12:
        what = r"empty file|not an image, or its header|too large: 30000 x 30000 pixels|animated: 2 frames"
        with pytest.raises(ValueError, match=rf"some\.tar: at offset \d+: sample 'odd': ({what})"):
            index_shards(tmp_path)
        return
    index_shards(tmp_path)
    shards = open_shards(tmp_path)
    assert main(["shards", "verify", str(tmp_path), "--workers", "1"]) == 1
    line, last = capsys.readouterr().out.splitlines()
    assert line.startswith(f"some.tar: sample 'odd' at offset {int(shards.offset[1])}: does not decode: ")
    assert any(reason in line for reason in reasons.split("|")) and last.endswith("damaged, 1 found")
