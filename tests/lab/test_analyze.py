"""Analyses of trained models: changed loops against a plain run."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sret_scale import cli
from sret_scale.config.run_config import to_plain
from sret_scale.lab.analysis.loop_worth import Subject, changed_chain, measure, study_loops
from sret_scale.model import SReT
from sret_scale.model.stage import Application
from sret_scale.runs.checkpoint import save_checkpoint
from tests.tiny import TINY_MODEL, tiny_config, tiny_shards, write_config


def _subject(seed: int = 0, num_images: int = 12) -> Subject:
    torch.manual_seed(seed)
    model = SReT(TINY_MODEL).eval()
    nn.init.normal_(model.head.weight, std=0.5)
    batches = tuple((torch.randn(num_images // 2, 3, 28, 28), torch.arange(num_images // 2) % 10) for _ in range(2))
    return Subject(name="tiny", model=model, batches=batches)


def _applications() -> tuple[list[Application], torch.Tensor]:
    """The second stage's chain, whose loops slice permuted tokens, and an input."""
    seen: list[tuple[list[Application], torch.Tensor]] = []
    config = replace(TINY_MODEL, stages=(TINY_MODEL.stages[0], replace(TINY_MODEL.stages[1], num_loops=3)))
    torch.manual_seed(0)
    model = SReT(config).eval()

    def note(applications: list[Application], x_BND: torch.Tensor) -> torch.Tensor:
        seen.append((list(applications), x_BND))
        return x_BND

    model.stages[1].run_chain = note  # type: ignore[assignment]
    with torch.no_grad():
        model(torch.randn(2, 3, 28, 28))
    return seen[0]


@torch.no_grad()
def test_a_changed_loop_is_what_a_plain_run_of_it_computes() -> None:
    applications, x_BND = _applications()

    def run(chain: object) -> torch.Tensor:
        state = x_BND
        for step in chain:  # type: ignore[attr-defined]
            state = step(state)
        return state

    first, second, third = applications
    after = third(second.reordered(first(x_BND)))
    assert torch.equal(run(changed_chain(applications, 1, "left out")), after)
    again = replace(second, gather=None, scatter=None)
    assert torch.equal(run(changed_chain(applications, 1, "repeated")), third(again(second(first(x_BND)))))
    swapped = [replace(first, slot=second.slot, projection=second.projection)]
    swapped += [replace(second, slot=first.slot, projection=first.projection), third]
    assert torch.equal(run(changed_chain(applications, 0, "swapped")), run(swapped))
    assert not torch.equal(run(changed_chain(applications, 1, "left out")), run(applications))


def test_every_loop_is_changed_in_every_way_and_the_model_left_as_it_was() -> None:
    subject = _subject()
    study = study_loops(subject, most_loops=8)
    assert [(e.stage, e.loop, e.change) for e in study.effects if e.stage == 1] == [
        (1, 0, "left out"),
        (1, 0, "repeated"),
        (1, 0, "swapped"),
        (1, 1, "left out"),
        (1, 1, "repeated"),
    ]
    assert len(study.effects) == 8 + 5 and len({e.loss for e in study.effects}) > 10
    assert (study.loss, study.top1) == measure(subject.model, subject)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loops", "--loops", "0"], "--loops: expected at least 1"),
        (["loops", "--images", "0"], "--images: expected at least 1"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--images" not in arguments:
        monkeypatch.setattr("sret_scale.lab.analysis.loop_worth.open_subject", lambda *_: _subject(num_images=2))
    assert cli.main(["analyze", arguments[0], "run", *arguments[1:]]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.lengthy
def test_the_command_looks_at_a_run_and_writes_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tiny_shards(tmp_path / "shards"))
    run = tmp_path / "run"
    write_config(run / "config.yaml", config)
    tensors = {"weights": config.model.build().state_dict()}
    save_checkpoint(run / "checkpoints", step=3, tensors=tensors, state={"model": to_plain(config.model), "loader": ""})
    assert cli.main(["analyze", "loops", str(run), "--images", "20"]) == 0
    said = capsys.readouterr().out
    assert "raw weights of step 3, 5 applications" in said and "loops_0.svg" in said
    assert "of stage 0 repeated: " in said or "of stage 1 repeated: " in said
    assert {file.suffix for file in (run / "analysis").glob("loops_0.*")} == {".svg", ".png", ".csv"}
    with (run / "analysis" / "loops_0.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 14
    assert cli.main(["analyze", "loops", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
