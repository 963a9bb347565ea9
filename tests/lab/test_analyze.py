"""Analyses of trained models: normalised directions, CKA against its definition, changed loops against a plain run."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sret_scale import cli
from sret_scale.config.run_config import to_plain
from sret_scale.lab.analysis.landscape import landscape, normalised_direction
from sret_scale.lab.analysis.loop_worth import changed_chain, study_loops
from sret_scale.lab.analysis.similarity import linear_cka, similarity
from sret_scale.lab.analysis.subject import Subject, measure
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


def test_a_direction_has_the_norm_of_each_filter_and_leaves_vectors_alone() -> None:
    model = _subject().model
    direction = normalised_direction(model, seed=3)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    assert set(direction) == {name for name, weight in weights.items() if weight.ndim > 1}
    for name, step in direction.items():
        for own, row in zip(weights[name], step, strict=True):
            assert math.isclose(float(row.norm()), float(own.norm()), rel_tol=1e-4, abs_tol=1e-6), name
    other = normalised_direction(model, seed=4)
    assert not any(torch.equal(direction[name], other[name]) for name in direction)


def test_the_middle_of_a_landscape_is_the_model_which_is_left_as_it_was() -> None:
    subject = _subject()
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    surface = landscape(subject, points=3, reach=0.5, seed=1)
    assert (surface.loss[1, 1], surface.top1[1, 1]) == measure(subject.model, subject)
    assert len(set(surface.loss.ravel())) == 9
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    moved = normalised_direction(subject.model, 2)
    with torch.no_grad():
        for name, weight in subject.model.named_parameters():
            if name in moved:
                weight.sub_(0.5 * moved[name])
    assert measure(subject.model, subject)[0] == pytest.approx(surface.loss[0, 1], rel=1e-5)


def test_cka_is_that_of_the_gram_matrices_and_ignores_rotation_and_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x_BD, y_BD = (torch.randn(40, width, generator=generator, dtype=torch.float64) for width in (6, 9))
    centring = torch.eye(40, dtype=torch.float64) - 1 / 40
    k_BB, l_BB = (centring @ part @ part.T @ centring for part in (x_BD, y_BD))
    hsic = (k_BB * l_BB).sum() / math.sqrt((k_BB * k_BB).sum() * (l_BB * l_BB).sum())
    assert linear_cka(x_BD, y_BD) == pytest.approx(float(hsic), rel=1e-9)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    assert linear_cka(x_BD, 3 * x_BD @ rotation + 5) == pytest.approx(1.0)
    assert math.isnan(linear_cka(x_BD, torch.ones(40, 3)))


def test_similarity_compares_every_use_once_and_itself_with_one() -> None:
    subject = _subject()
    found = similarity(subject, most_uses=8)
    assert found.uses == ((0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 0, 0), (1, 0, 1))
    np.testing.assert_allclose(np.diag(found.cka), 1.0)
    np.testing.assert_allclose(found.cka, found.cka.T)
    stream_BND = next(subject.model.stage_outputs(torch.cat([images for images, _ in subject.batches])))
    last = stream_BND.mean(dim=(2, 3)).detach()
    assert len(similarity(subject, most_uses=2).uses) == 4
    assert linear_cka(last, last) == pytest.approx(1.0)


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
        (["landscape", "--points", "4"], "--points: expected an odd number"),
        (["landscape", "--reach", "0"], "--reach: expected a number above 0"),
        (["similarity", "--uses", "1"], "--uses: expected at least 2"),
        (["loops", "--loops", "0"], "--loops: expected at least 1"),
        (["loops", "--images", "0"], "--images: expected at least 1"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--images" not in arguments:
        monkeypatch.setattr("sret_scale.lab.analysis.subject.open_subject", lambda *_: _subject(num_images=2))
    assert cli.main(["analyze", arguments[0], "run", *arguments[1:]]) == 2
    assert message in capsys.readouterr().err


def test_the_command_looks_at_a_run_and_writes_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tiny_shards(tmp_path / "shards"))
    run = tmp_path / "run"
    write_config(run / "config.yaml", config)
    tensors = {"weights": SReT(config.model).state_dict()}
    save_checkpoint(run / "checkpoints", step=3, tensors=tensors, state={"model": to_plain(config.model), "loader": ""})
    for kind, name in (("loops", "loops_0"), ("similarity", "similarity_0"), ("landscape", "landscape_0")):
        closely = ["--points", "3"] if kind == "landscape" else []
        assert cli.main(["analyze", kind, str(run), "--images", "20", *closely]) == 0
        said = capsys.readouterr().out
        assert "raw weights of step 3, 5 applications" in said and f"{name}.svg" in said
        assert {file.suffix for file in (run / "analysis").glob(f"{name}.*")} == {".svg", ".png", ".csv"}
    with (run / "analysis" / "loops_0.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 14
    assert cli.main(["analyze", "loops", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
