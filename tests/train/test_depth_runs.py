"""Telemetry and depth choices in whole runs on two ranks: the same bits with a probe, and after a restart."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sret_scale.config.run_config import EngineConfig, ModelConfig, RunConfig
from sret_scale.config.step_depth import DepthConfig
from sret_scale.lab.early_exit import exit_points
from sret_scale.memory import MemoryConfig
from sret_scale.train.distributed import ranks_from_environment
from sret_scale.train.telemetry import TelemetryConfig
from tests.backbone_configs import BACKBONES
from tests.ranks.depth_ranks import exit_request
from tests.runs import digest, run_two_ranks
from tests.tiny import TINY_MODEL, tiny_config, tiny_shards, write_config

SHARED = replace(
    TINY_MODEL,
    stages=tuple(
        replace(s, num_loops=5, projections="per_block", conditioning="norm_by_depth") for s in TINY_MODEL.stages
    ),
)
MODELS: dict[str, ModelConfig] = {"sret": SHARED}
for name, backbone in BACKBONES.items():
    stage = replace(backbone.stages[0], num_loops=5, projections="per_block", conditioning="norm_by_depth")
    MODELS[name] = replace(backbone, stages=(stage,))
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
    """Runs of three steps, with and without telemetry, at ZeRO 0 and 2. At ZeRO 1 five steps with every choice of
    depth: with telemetry straight through; without it from a checkpoint after three steps, as of a killed run."""
    folder = tmp_path_factory.mktemp("depth")
    config = tiny_config(tiny_shards(folder / "shards"))
    config = replace(config, optim=replace(config.optim, ema_horizon_images=0))
    runs: dict[str, RunConfig] = {}
    for name, schedule in (("zero0", "none"), ("zero2", "binomial")):
        on = replace(
            config,
            memory=MemoryConfig(schedule=schedule),
            engine=EngineConfig(ds_config=name),
            telemetry=TelemetryConfig(interval_steps=2),
        )
        runs |= {f"{name}-on": on, f"{name}-off": replace(on, telemetry=TelemetryConfig(interval_steps=0))}
    for name, run in runs.items():
        write_config(folder / name / "config.yaml", run, total_images=96, checkpoint_interval_images=0)
    elastic = replace(
        config,
        depth=DEPTH,
        memory=MemoryConfig(schedule="segments"),
        engine=EngineConfig(ds_config="zero1_autocast"),
    )
    # Batches that do not divide the test set: the last ones of an evaluation are filled up.
    every = {"checkpoint_interval_images": 90, "total_images": 150, "micro_batch_size": 5, "global_batch_size": 30}
    order: list[str] = []
    for kind, model in MODELS.items():
        straight, cut = f"{kind}-straight", f"{kind}-cut"
        for name, interval_steps in ((straight, 2), (cut, 0)):
            run = replace(elastic, model=model, telemetry=TelemetryConfig(interval_steps=interval_steps))
            write_config(folder / name / "config.yaml", run, **every)
        order += [straight, cut, f"{cut}@3", cut]
    run_two_ranks("tests.ranks.depth_ranks", folder, *runs, *order, "sret-straight?")
    return folder


@pytest.mark.parametrize("name", ["zero0", "zero2"])
def test_telemetry_changes_no_bit_of_a_run(folder: Path, name: str) -> None:
    assert digest(folder / f"{name}-on") == digest(folder / f"{name}-off")
    assert lines(folder / f"{name}-off", "telemetry") == []
    records = lines(folder / f"{name}-on", "telemetry")
    assert [record["step"] for record in records] == [0, 2]
    for record in records:
        assert [block["num_loops"] for block in record["blocks"]] == [3, 2]
        assert all(value > 0 for block in record["blocks"] for value in block["gradient_norm"])
        assert set(record["classes"]) >= {"tied", "projection", "stem", "head"}
    assert records[1]["classes"]["tied"]["update"] > 0


@pytest.mark.parametrize("kind", MODELS)
def test_a_killed_run_continues_with_the_depths_it_would_have_had_telemetry_or_not(folder: Path, kind: str) -> None:
    straight, cut = folder / f"{kind}-straight", folder / f"{kind}-cut"
    records = lines(straight, "telemetry")
    assert [record["step"] for record in records] == [0, 2, 4]
    # Of the steps that were looked at, those with more loops than get a gradient.
    cosines = [record["truncation"]["stem"] for record in records if "truncation" in record]
    assert cosines and all(0 < cosine <= 1 for cosine in cosines)
    entropies = [value for block in records[0]["blocks"] for value in block["attention_entropy"]]
    assert (set(entropies) == {None}) == (kind == "mixer")
    assert lines(cut, "telemetry") == [] and len(lines(cut, "restart")) == 1
    assert digest(cut) == digest(straight)
    losses = [{line["step"]: line["loss"] for line in lines(run, "train")} for run in (cut, straight)]
    assert losses[0] == losses[1]


def test_two_ranks_find_the_early_exits_of_one(folder: Path) -> None:
    run = folder / "sret-straight"
    together = json.loads((run / "exits.json").read_text())
    for found, alone in zip(together, exit_points(exit_request(run), ranks_from_environment()), strict=True):
        assert found.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-4)
        assert found == alone
    assert together[1]["applications"] < together[2]["applications"] < together[3]["applications"]
