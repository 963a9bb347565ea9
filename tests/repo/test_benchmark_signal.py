"""The coordinate check: what its verdicts rest on, and the table of the documentation against the recorded runs."""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import signal

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "signal.json"


def result(depth: int, seed: int, change: float, loss: float = 1.0, lr: float = 1e-3) -> dict[str, Any]:
    row = {
        "step": 10,
        "logit_change": change,
        "stage_rms": [1.0, 1.0, 1.0],
        "contribution": [1.0, 0.6, 1.0],
        "loss": loss,
    }
    return {"scheme": "loop_aware", "applications": depth, "lr": lr, "seed": seed, "rows": [row]}


def test_a_verdict_compares_means_over_the_seeds() -> None:
    results = [result(20, 0, 1.0), result(20, 1, 3.0), result(108, 0, 4.0), result(108, 1, 3.0)]
    found = signal.verdict(results, "loop_aware", 1e-3, 10)
    assert found is not None and found["passes"]
    assert found["score_ratio"] == 1.75
    assert found["least_contribution"] == 0.6
    wider = signal.verdict([*results, result(300, 0, 0.9)], "loop_aware", 1e-3, 10)
    assert wider is not None and not wider["passes"]
    broken = result(300, 0, 2.0)
    broken["rows"] = [{"step": 10, "loss": "not finite"}]
    assert signal.verdict([*results, broken], "loop_aware", 1e-3, 10) == {
        "scheme": "loop_aware",
        "lr": 1e-3,
        "step": 10,
        "depths": [20, 108, 300],
        "passes": False,
    }


def test_the_best_rate_is_that_of_the_least_mean_loss() -> None:
    results = [
        result(20, seed, 1.0, loss, lr)
        for lr, losses in ((1e-3, (2.0, 1.0)), (2e-3, (1.0, 1.5)))
        for seed, loss in enumerate(losses)
    ]
    assert signal.optimum(results, "loop_aware", [1e-3, 2e-3], 10, 20) == {
        "losses": {1e-3: 1.5, 2e-3: 1.25},
        "best_lr": 2e-3,
    }


def test_a_run_again_replaces_its_own_steps_alone() -> None:
    first, again = result(20, 0, 1.0), result(20, 0, 2.0)
    again["rows"][0]["step"] = 1
    merged = signal.merged([first, result(20, 1, 1.0)], again)
    assert [row["step"] for row in merged[-1]["rows"]] == [1, 10]
    assert signal.merged(merged, result(20, 0, 5.0))[-1]["rows"][1]["logit_change"] == 5.0
    assert len(merged) == 2


def test_more_images_change_none_of_the_first() -> None:
    few, labels = signal.sample_images(70)
    more, more_labels = signal.sample_images(90)
    assert torch.equal(few, more[:70]) and torch.equal(labels, more_labels[:70])


def test_a_short_check_measures_every_stage() -> None:
    config = signal.config_at(20, "loop_aware", "frozen", "per_loop")
    rows = signal.check(config, seed=0, lr=1e-3, report_steps=(1, 2), batch=4)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(len(row["stage_rms"]) == len(row["contribution"]) == 3 and row["logit_change"] > 0 for row in rows)


def recorded() -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads(RECORD.read_text())["results"]
    return results


@pytest.mark.parametrize("step", [1, 10, 100])
def test_loop_aware_passed_over_every_depth(step: int) -> None:
    found = signal.verdict(recorded(), "loop_aware", 1e-3, step)
    assert found is not None and found["passes"]
    assert found["depths"] == [20, 108, 300, 1000]


def test_the_best_rate_of_loop_aware_moves_by_at_most_one_step_of_two_with_depth() -> None:
    results = recorded()
    rates = sorted({one["lr"] for one in results if one["scheme"] == "loop_aware"})
    assert len(rates) >= 5 and all(high == 2 * low for low, high in itertools.pairwise(rates))
    shallow, deep = (signal.optimum(results, "loop_aware", rates, 100, depth) for depth in (20, 300))
    for found in (shallow, deep):
        assert list(found["losses"]) == rates
        # At an end of the sweep the optimum could lie beyond it.
        assert found["best_lr"] in rates[1:-1]
    assert 0.5 <= deep["best_lr"] / shallow["best_lr"] <= 2


def test_the_table_in_the_documentation_is_that_of_the_recorded_runs(capsys: pytest.CaptureFixture[str]) -> None:
    results = recorded()
    arguments = argparse.Namespace(schemes=signal.SCHEMES, steps=[1, 10, 100], lr=[1e-3], depths=[])
    signal.print_verdicts(results, arguments)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    page = (ROOT / "docs" / "numerics.md").read_text().splitlines()
    assert rows == [line for line in page if line.startswith("| `") and line.endswith(("| yes |", "| no |"))]
