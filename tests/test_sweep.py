"""Experiments: which runs a file declares, what matching holds equal, and how a sweep takes failures and stops."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sret_scale import cli
from sret_scale.lab.experiment import Experiment, load_experiment, plan_runs
from sret_scale.lab.sweep import run_sweep, sweep_table
from sret_scale.model import describe
from sret_scale.train.config import RunConfig, to_yaml
from tests.tiny import tiny_config

LOOPS = "model.stages.0.num_loops + model.stages.1.num_loops"


@pytest.fixture
def base(tmp_path: Path) -> str:
    file = tmp_path / "base.yaml"
    file.write_text(to_yaml(tiny_config(tmp_path)))
    return str(file)


def _file(folder: Path, **tree: Any) -> Path:
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


def test_a_grid_is_every_combination_in_order(tmp_path: Path, base: str) -> None:
    grid = {LOOPS: [2, [3, 5]], "train.seed": [0, 1]}
    _, planned = load_experiment(_file(tmp_path, base=base, grid=grid, set={"optim.weight_decay": 0.1}))
    assert [run.name for run in planned] == [
        "num_loops-2_seed-0",
        "num_loops-2_seed-1",
        "num_loops-3_num_loops-5_seed-0",
        "num_loops-3_num_loops-5_seed-1",
    ]
    assert [run.applications for run in planned] == [4, 4, 8, 8]
    assert [run.config.train.seed for run in planned] == [0, 1, 0, 1]
    assert {run.config.optim.weight_decay for run in planned} == {0.1}


def test_a_list_of_runs_may_change_the_whole_model(base: str) -> None:
    runs = [{"train.seed": 3}, {"train.seed": 3, "model": "demo_control_20"}]
    planned = plan_runs(Experiment(base=base, runs=runs))
    assert [run.applications for run in planned] == [5, 20] and planned[1].config.train.seed == 3


def test_equal_flops_trade_images_for_depth(base: str) -> None:
    planned = plan_runs(Experiment(base=base, grid={LOOPS: [3, 6, 12]}, match="equal_flops"))
    config = tiny_config(Path("x"))
    budget = describe(config.model)["macs"] * config.train.total_images
    for run in planned:
        assert abs(run.macs * run.config.train.total_images - budget) <= run.macs
        ratio = run.config.train.total_images / config.train.total_images
        assert run.config.optim.warmup_images == round(64 * ratio)
        assert run.config.train.checkpoint_interval_images == round(96 * ratio)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"grid": {}}, "either `grid`"),
        ({"grid": {"train.seed": []}}, "grid.train.seed is empty"),
        ({"grid": {"train.sed": [1]}}, "run sed-1: unknown key 'train.sed': did you mean 'seed'"),
        ({"grid": {"train.seed": ["one"]}}, "train.seed"),
        ({"grid": {"train.seed": [1, 1]}}, "two runs would be called 'seed-1'"),
        ({"grid": {LOOPS: [[1, 2, 3]]}}, "expected one value for all or 2 values"),
        (
            {"grid": {LOOPS: [900]}, "match": "equal_flops"},
            "run num_loops-900: equal_flops leaves .* one global batch of 32",
        ),
        ({"grid": {"train.seed": [1]}, "match": "equal_luck"}, "match"),
        ({"grid": {"train.seed": [1]}, "retry": 2}, "unknown key 'retry': did you mean 'retries'"),
        ({"grid": {"train.seed": [1]}, "retries": -1}, "expected 0 or more"),
    ],
)
def test_a_bad_experiment_is_refused_with_its_reason(
    tmp_path: Path, base: str, tree: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_experiment(_file(tmp_path, base=base, **tree))


class _Starter:
    """Stands in for training: a run ends with the next of its statuses, and leaves the status file."""

    def __init__(self, **statuses: list[int]) -> None:
        self.statuses = statuses
        self.started: list[str] = []

    def __call__(self, config: RunConfig, path: Path) -> int:
        self.started.append(path.name)
        if config.train.seed == 9:
            raise ValueError("no shards")
        status = (self.statuses.get(path.name.replace("-", "")) or [0]).pop(0)
        path.mkdir(parents=True, exist_ok=True)
        state = {0: "finished", 85: "stopped"}.get(status, "failed")
        (path / "status.json").write_text(json.dumps({"state": state}))
        return status


def _sweep(base: str, folder: Path, starter: _Starter, seeds: list[int]) -> tuple[int, list[str]]:
    said: list[str] = []
    experiment = Experiment(base=base, grid={"train.seed": seeds}, retries=1)
    return run_sweep(experiment, plan_runs(experiment), folder, start=starter, say=said.append), said


def test_a_failure_is_retried_then_reported_and_stops_nothing(tmp_path: Path, base: str) -> None:
    starter = _Starter(seed0=[1, 1, 1], seed1=[1, 0])
    status, said = _sweep(base, tmp_path / "runs", starter, [0, 9, 1, 2])
    assert status == 1
    assert starter.started == ["seed-0", "seed-0", "seed-9", "seed-1", "seed-1", "seed-2"]
    assert any(line.startswith("failed: seed-0: exit status 1 after 2 attempts") for line in said)
    assert "failed: seed-9: no shards" in said and said[-1].startswith("2 of 4 runs finished")


def test_the_same_command_continues_after_a_stop_and_skips_what_is_finished(tmp_path: Path, base: str) -> None:
    first, second = _Starter(seed1=[85]), _Starter()
    assert _sweep(base, tmp_path / "runs", first, [0, 1, 2])[0] == 85
    assert _sweep(base, tmp_path / "runs", second, [0, 1, 2])[0] == 0
    assert (first.started, second.started) == (["seed-0", "seed-1"], ["seed-1", "seed-2"])


def test_the_table_says_what_each_run_costs(base: str) -> None:
    lines = sweep_table(plan_runs(Experiment(base=base, grid={LOOPS: [1, 2]}))).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert lines[0].split()[:2] == ["run", "applications"] and "iB" in lines[1]


def test_a_dry_run_starts_nothing(tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = _file(tmp_path, base=base, grid={"train.seed": [4]})
    before = set(tmp_path.iterdir())
    assert cli.main(["sweep", str(file), "--dry-run", "--folder", str(tmp_path / "runs")]) == 0
    assert "seed-4" in capsys.readouterr().out and set(tmp_path.iterdir()) == before
    assert cli.main(["sweep", str(tmp_path / "absent.yaml")]) == 2
