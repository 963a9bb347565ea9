"""The examples of docs/memory.md run, and the plan command answers and refuses as it says."""

import json
import re
from pathlib import Path

import pytest
import torch

from sret_scale.cli import main
from tests.tiny import tiny_config, write_config

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
SMALL = ["plan", "demo_control_20", "--image-size", "28", "--reserve", "0", "--world-size", "2"]


@pytest.mark.lengthy
@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_examples_of_the_page_run(index: int) -> None:
    scope: dict[str, object] = {}
    exec(SNIPPETS[index], scope)
    assert "schedule" in scope


@pytest.mark.lengthy
def test_plan_prints_a_table_and_json_and_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.svg"
    assert main([*SMALL, "--memory", "1GiB", "--micro-batch", "8", "--draw", str(picture)]) == 0
    assert "activations" in capsys.readouterr().out
    assert main([*SMALL, "--memory", "1GiB", "--micro-batch", "8", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["total_bytes"] <= plan["budget_bytes"] == 2**30
    assert len(plan["schedules"]) == 3
    svg = picture.read_text()
    assert all(f"stage {index}: {name}" in svg for index, name in enumerate(plan["schedules"]))


@pytest.mark.lengthy
def test_plan_makes_room_for_a_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    plans = []
    for teacher in ([], ["--teacher", "timm:resnet18"]):
        assert main([*SMALL, "--memory", "auto", "--device", "cpu", "--micro-batch", "8", "--json", *teacher]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0]["teacher"] == 0 < plans[1]["teacher"]
    assert plans[1]["total_bytes"] - plans[0]["total_bytes"] == plans[1]["teacher"]
    assert plans[0]["budget_bytes"] > 2**30


@pytest.mark.lengthy
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what a machine without a GPU says")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "1MiB", "--micro-batch", "8"], "next cheaper choice"),
        (["--memory", "lots"], "expected a size such as 80G, 80GB or 80GiB"),
        (["--micro-batch", "0"], "expected a whole number"),
        (["--memory", "auto"], "--memory auto: this machine has no GPU"),
        (["--teacher", "timm:resnet1"], "did you mean"),
        (["--zero-stage", "4"], "zero stage: expected 0, 1, 2 or 3"),
        (["--world-size", "0"], "world size: expected at least 1"),
    ],
)
def test_plan_names_what_is_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.lengthy
def test_describe_and_plan_take_a_run_its_file_and_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_config(run / "config.yaml", tiny_config(tmp_path))
    plan = ["--memory", "1G", "--reserve", "0", "--micro-batch", "4", "--precision", "fp32", "--json"]
    for place in (run, run / "config.yaml"):
        assert main(["describe", str(place), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["applications"] == 5
        assert main(["describe", str(place), "model.num_loops=4", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["applications"] == 8
        assert main(["plan", str(place), "model.num_loops=4", *plan]) == 0
        assert json.loads(capsys.readouterr().out)["budget_bytes"] == 2**30
    assert main(["describe", str(tmp_path)]) == 2
    assert "is a folder: expected its configuration" in capsys.readouterr().err
