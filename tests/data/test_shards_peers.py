"""Readers that are not installed with the product open its shards: DALI on the processor, wids, and DALI's wds2idx.

python -m venv peers && peers/bin/pip install nvidia-dali-cuda120 'webdataset<1' torch pillow
SRET_SCALE_PEERS_PYTHON=peers/bin/python ./launch.sh test tests/data/test_shards_peers.py
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.shards.index import open_shards
from data_pipelines.upkeep.sidecars import write_sidecars
from data_pipelines.writing.write import WriteConfig, write_shards
from tests.data.shard_sources import make_tree, members_of

pytestmark = pytest.mark.multi_process

# They bring packages of their own, so another Python may hold them.
PYTHON = os.environ.get("SRET_SCALE_PEERS_PYTHON", sys.executable)

DALI = """
import glob, json, sys, zlib
from nvidia.dali import fn, pipeline_def

tars = sorted(glob.glob(sys.argv[1] + "/*.tar"))
indices = [tar[:-4] + ".idx" for tar in tars]

@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def images():
    data, label, metadata = fn.readers.webdataset(
        paths=tars, index_paths=indices, ext=["jpg", "cls", "json"], missing_component_behavior="error", name="shards"
    )
    return data, label, metadata, fn.decoders.image(data, device="cpu")

pipeline = images()
pipeline.build()
for _ in range(pipeline.reader_meta("shards")["epoch_size"]):
    data, label, metadata, pixels = (part.at(0) for part in pipeline.run())
    print(json.dumps([zlib.crc32(data.tobytes()), label.tobytes().decode(), metadata.tobytes().decode(), pixels.shape]))
"""

WIDS = """
import json, sys
import wids

for sample in wids.ShardListDataset(sys.argv[1] + "/wids.json", keep=True, cache_dir=sys.argv[2]):
    image = sample[".jpg"]
    print(json.dumps([sample["__key__"], sample[".cls"], sample[".json"]["source"], image.size]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    write_shards(WriteConfig(kind="folder", source=make_tree(root / "tree"), shard_samples=9), root / "set")
    write_sidecars(root / "set", split="train")
    return root / "set"


@cache
def why_not(module: str) -> str:
    """Why the peer cannot be asked; empty when it can."""
    found = subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True, text=True)
    return f"{module} is not installed for {PYTHON}: see the head of this file" if found.returncode else ""


def ask(module: str, script: str, *arguments: Path) -> list[Any]:
    """What a script says with the peer's Python, one JSON value a line; skips the test where the peer is absent."""
    if why_not(module):
        pytest.skip(why_not(module))
    command = [PYTHON, "-W", "ignore", "-c", script, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_dali_reads_the_shards_by_their_sidecars(folder: Path) -> None:
    shards = open_shards(folder)
    metadata = members_of(folder, "json")
    expected = [
        [
            int(shards.crc[row]),
            str(int(shards.label[row])),
            metadata[shards.key(row)].decode(),
            [int(shards.height[row]), int(shards.width[row]), 3],
        ]
        for row in range(shards.num_samples)
    ]
    assert ask("nvidia.dali", DALI, folder) == expected


def test_wids_reads_the_shards_by_their_sidecar(folder: Path, tmp_path: Path) -> None:
    shards = open_shards(folder)
    rows = ask("wids", WIDS, folder, tmp_path)
    assert [row[:2] for row in rows] == [[shards.key(row), int(shards.label[row])] for row in range(shards.num_samples)]
    assert all(source == f"{key}.JPEG" and size == [24, 20] for key, _, source, size in rows)


def test_our_idx_files_are_those_of_wds2idx(folder: Path, tmp_path: Path) -> None:
    if why_not("wds2idx"):
        pytest.skip(why_not("wds2idx"))
    for tar in sorted(folder.glob("*.tar")):
        subprocess.run([PYTHON, "-m", "wds2idx", tar, tmp_path / "own.idx"], check=True, capture_output=True)
        assert tar.with_suffix(".idx").read_text() == (tmp_path / "own.idx").read_text()
