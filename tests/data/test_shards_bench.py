"""`shards bench`: every stage reads what it says, and says so in plain numbers."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.shards.index import open_shards
from data_pipelines.upkeep.speed import Speed, measure_speed
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.cli import main
from tests.data.shard_sources import make_tree

STAGES = ["sequential", "random", "decode", "view", "loader"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    write_shards(WriteConfig(kind="folder", source=make_tree(root / "tree"), shard_samples=9), root / "set")
    return root / "set"


def measured(folder: Path, **options: Any) -> dict[str, Speed]:
    asked = {"seconds": 0.2, "image_size": 16, "num_threads": 2, "cold": False} | options
    return {speed.stage: speed for speed in measure_speed(folder, **asked)}


def test_each_stage_reads_all_of_a_small_set(folder: Path) -> None:
    shards = open_shards(folder)
    speeds = measured(folder)
    assert list(speeds) == STAGES
    tar_bytes = sum(entry.bytes for entry in shards.manifest.shards)
    assert (round(speeds["sequential"].images), speeds["sequential"].bytes) == (24, tar_bytes)
    for stage in ("random", "decode", "view"):
        assert (speeds[stage].images, speeds[stage].bytes) == (24, int(shards.length.sum()))
    # The loader goes on into further epochs until its time is up.
    assert speeds["loader"].images >= 24 and speeds["loader"].images % 24 == 0 and speeds["loader"].seconds >= 0.2
    assert all(speed.images_per_s == speed.images / speed.seconds > 0 for speed in speeds.values())


def test_the_time_of_a_stage_is_limited(folder: Path) -> None:
    assert {stage: speed.images for stage, speed in measured(folder, seconds=1e-9).items() if stage != "loader"} == {
        "sequential": pytest.approx(8),
        "random": 1,
        "decode": 1,
        "view": 1,
    }


def test_cold_asks_the_kernel_to_drop_every_tar_before_each_stage(folder: Path, monkeypatch: Any) -> None:
    dropped: list[str] = []

    def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        dropped.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    measured(folder, seconds=1e-9, cold=True)
    assert dropped == list(open_shards(folder).shard_names) * len(STAGES)


def test_the_command_prints_lines_or_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["shards", "bench", str(folder), "--seconds", "0.01", "--image-size", "16", "--threads", "1"]
    assert main(quick) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == STAGES and all("images/s" in line for line in lines[1:])
    assert main([*quick, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == STAGES and facts["decode"]["images"] >= 1 and facts["decode"]["images_per_s"] > 0


def test_what_cannot_be_measured_is_an_error(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "bench", str(tmp_path)]) == 2
    assert "not a shard set" in capsys.readouterr().err
    assert main(["shards", "bench", str(folder), "--threads", "0"]) == 2
    assert "above 0" in capsys.readouterr().err
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    tar = copy / "shard-000001.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    assert main(["shards", "bench", str(copy), "--seconds", "1"]) == 2
    assert "checksum" in capsys.readouterr().err
