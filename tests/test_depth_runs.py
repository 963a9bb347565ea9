"""Telemetry and depth choices in whole runs on two ranks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sret_scale.memory import MemoryConfig
from sret_scale.train.config import EngineConfig, RunConfig
from sret_scale.train.telemetry import TelemetryConfig
from tests.runs import digest, run_two_ranks
from tests.tiny import tiny_config, tiny_shards, write_config

pytestmark = pytest.mark.multi_process


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    every = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in every if line["kind"] == kind]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of five steps, with and without telemetry at every ZeRO stage that has it."""
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
    run_two_ranks("tests.depth_ranks", folder, *runs)
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
