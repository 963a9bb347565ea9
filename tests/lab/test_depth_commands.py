"""Depth at use on the command line: other loops, early exit, growing and tying, on a run folder made by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sret_scale.cli import main
from sret_scale.config.run_config import from_yaml, override, to_plain
from sret_scale.model import SReT
from sret_scale.model.vision.weight_files import load_model
from sret_scale.runs.checkpoint import read_tensors, save_checkpoint
from sret_scale.train.load_run import initial_state
from tests.tiny import TINY_MODEL, tiny_config, tiny_shards, write_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model is untied: four blocks, then two."""
    folder = tmp_path_factory.mktemp("runs")
    first, second = TINY_MODEL.stages
    model = replace(
        TINY_MODEL, stages=(replace(first, num_loops=1, num_blocks=4), replace(second, num_loops=1, num_blocks=2))
    )
    config = replace(tiny_config(tiny_shards(folder / "shards")), model=model)
    # Batches that do not divide the test set: the last ones are filled up.
    write_config(folder / "run" / "config.yaml", config, micro_batch_size=12, global_batch_size=24)
    torch.manual_seed(0)
    state = {"model": to_plain(model)}
    save_checkpoint(folder / "run" / "checkpoints", step=7, tensors={"weights": SReT(model).state_dict()}, state=state)
    return folder / "run"


def test_a_run_is_evaluated_at_another_depth(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--loops", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["loops"], found["applications"], found["num_samples"]) == ([2, 2], 12, 128)


@pytest.mark.lengthy
def test_early_exit_prints_and_draws_its_curve(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(run), "--loops", "2", "--early-exit", "convergence", "--thresholds", "1e6,1e-9"]
    assert main([*command, "--json"]) == 0
    whole, eager, last = json.loads(capsys.readouterr().out)
    assert (whole["applications"], eager["applications"], last["applications"]) == (12, 6, 12)
    assert eager["macs"] < last["macs"] == whole["macs"] and last["top1"] == whole["top1"]
    assert {file.suffix for file in (run / "early_exit").iterdir()} == {".svg", ".png", ".csv"}


@pytest.mark.slow
@pytest.mark.multi_process
def test_early_exit_on_ranks_is_that_of_one_process(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(run), "--loops", "2", "--early-exit", "convergence", "--thresholds", "1e6,0.4", "--json"]
    found = []
    for ranks in ([], ["--ranks", "2"]):
        assert main([*command, *ranks]) == 0
        text = capfd.readouterr().out
        found.append(
            [{**point, "loss": pytest.approx(point["loss"])} for point in json.loads(text[text.index("[\n") :])]
        )
    assert found[0] == found[1]


@pytest.mark.lengthy
def test_a_grown_model_says_its_loss_and_how_to_train_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run.parent / "deeper.safetensors"
    assert main(["weights", "grow", str(run), str(out), "--loops", "3"]) == 0
    text = capsys.readouterr().out
    before, after = (re.search(rf"{name} +loss ([\d.]+).* {count} applications", text) for name, count in
                     (("before", 6), ("after", 18)))  # fmt: skip
    assert before and after
    grown = load_model(out)
    assert [stage.num_loops for stage in grown.config.stages] == [3, 3]
    overrides = [line.strip() for line in text.splitlines() if line.startswith("  model.")]
    # What is printed makes the run's configuration one that takes the weights.
    config = override(from_yaml(run / "config.yaml"), overrides)
    assert config.model == grown.config
    assert initial_state(str(out), config.model).keys() == grown.state_dict().keys()


def test_a_run_is_exported_as_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run.parent / "native.safetensors"
    assert main(["export", str(run), str(out), "--format", "safetensors"]) == 0
    trained = read_tensors(run / "checkpoints" / "step-000000007", "weights")
    assert all(torch.equal(value, trained[name]) for name, value in load_model(out).state_dict().items())
    # No moving average was kept.
    assert main(["export", str(run), str(out), "--format", "safetensors", "--weights", "ema"]) == 2
    assert "holds no moving average" in capsys.readouterr().err
    assert main(["weights", "export", str(run), str(run.parent / "published.pth")]) == 0


def test_a_tied_model_is_smaller(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run.parent / "tied.safetensors"
    assert main(["weights", "tie", str(run), str(out), "--blocks", "2,1", "--keep-norms"]) == 0
    counts = [int(text.replace(",", "")) for text in re.findall(r"([\d,]+) parameters", capsys.readouterr().out)]
    assert counts[1] < counts[0] and load_model(out).config.num_applications == 6


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["evaluate", "RUN", "--loops", "0"], "--loops: expected at least 1"),
        (["evaluate", "RUN", "--thresholds", "0.5"], "belongs to --early-exit"),
        (["evaluate", "RUN", "--early-exit", "entropy", "--thresholds", "a"], "expected numbers such as 0.5,0.9"),
        (["evaluate", "RUN", "--early-exit", "entropy", "--thresholds", "2"], "above 0 and below 1"),
        (["weights", "grow", "RUN", "out.safetensors", "--loops", "0"], "--loops: expected at least 1"),
        (["weights", "tie", "RUN", "out", "--blocks", "2,1"], "must end in .safetensors"),
        (["weights", "tie", "RUN", "out.safetensors", "--blocks", "2;1"], "--blocks: expected numbers"),
        (["weights", "tie", "RUN", "out.safetensors", "--blocks", "3,1"], "cannot be tied into 3"),
    ],
)
def test_bad_input_is_named(run: Path, command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run) if part == "RUN" else part for part in command]) == 2
    assert message in capsys.readouterr().err
