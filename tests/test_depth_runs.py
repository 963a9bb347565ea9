"""Telemetry and depth choices in whole runs on two ranks: the same bits with a probe, and after a restart."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sret_scale.memory import MemoryConfig
from sret_scale.train.config import EngineConfig, RunConfig
from sret_scale.train.depth import DepthConfig
from sret_scale.train.telemetry import TelemetryConfig
from tests.runs import digest, run_two_ranks
from tests.tiny import TINY_MODEL, tiny_config, tiny_shards, write_config

SHARED = replace(
    TINY_MODEL,
    stages=tuple(
        replace(s, num_loops=5, projections="per_block", conditioning="norm_by_depth") for s in TINY_MODEL.stages
    ),
)
DEPTH = DepthConfig(
    loops="lognormal_poisson",
    mean_loops=3,
    left_out="any",
    backprop_loops=2,
    supervised_loops=(1, 2),
    supervision_weights=(0.5, 0.25),
    mixed_loops=(1,),
    mixed_weights=(0.5,),
)

pytestmark = pytest.mark.multi_process


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    every = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in every if line["kind"] == kind]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of five steps: with and without telemetry at every ZeRO stage that has it; with every choice of depth,
    straight through and from a checkpoint after three steps, as of a killed run."""
    folder = tmp_path_factory.mktemp("depth")
    config = tiny_config(tiny_shards(folder / "shards"))
    runs: dict[str, RunConfig] = {}
    for name, schedule in (("zero0", "none"), ("zero1_autocast", "binomial"), ("zero2", "per_application")):
        on = replace(
            config,
            memory=MemoryConfig(schedule=schedule),
            engine=EngineConfig(ds_config=name),
            telemetry=TelemetryConfig(interval_steps=2),
        )
        runs |= {f"{name}-on": on, f"{name}-off": replace(on, telemetry=TelemetryConfig(interval_steps=0))}
    for name, run in runs.items():
        write_config(folder / name / "config.yaml", run, total_images=160, checkpoint_interval_images=0)
    elastic = replace(config, model=SHARED, depth=DEPTH, memory=MemoryConfig(schedule="segments"))
    every = {"checkpoint_interval_images": 96, "total_images": 160}
    for name in ("straight", "cut"):
        write_config(folder / name / "config.yaml", elastic, **every)
    run_two_ranks("tests.depth_ranks", folder, *runs, "straight", "cut", "cut@3", "cut")
    return folder


@pytest.mark.parametrize("name", ["zero0", "zero1_autocast", "zero2"])
def test_telemetry_changes_no_bit_of_a_run(folder: Path, name: str) -> None:
    assert digest(folder / f"{name}-on") == digest(folder / f"{name}-off")
    assert lines(folder / f"{name}-off", "telemetry") == []
    records = lines(folder / f"{name}-on", "telemetry")
    assert [record["step"] for record in records] == [0, 2, 4]
    for record in records:
        assert [block["num_loops"] for block in record["blocks"]] == [3, 2]
        assert all(value > 0 for block in record["blocks"] for value in block["gradient_norm"])
        assert set(record["classes"]) >= {"tied", "projection", "stem", "head"}
    assert records[1]["classes"]["tied"]["update"] > 0


def test_a_killed_run_continues_with_the_depths_it_would_have_had(folder: Path) -> None:
    assert len(lines(folder / "cut", "restart")) == 1
    assert digest(folder / "cut") == digest(folder / "straight")
    losses = [{line["step"]: line["loss"] for line in lines(folder / name, "train")} for name in ("cut", "straight")]
    assert losses[0] == losses[1]
