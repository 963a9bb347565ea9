"""Whole runs that leave updates out for a loss that is not a number, and the statistics of their moving average."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_pipelines.image.augment import normalise
from data_pipelines.shards.index import open_shards
from sret_scale.config.run_config import from_yaml
from sret_scale.runs.checkpoint import list_checkpoints, read_state
from sret_scale.train.batch_norm import measured_statistics, training_batches
from sret_scale.train.distributed import Ranks
from sret_scale.train.divergence import left_out
from sret_scale.train.engine.clip import GradientNorms
from sret_scale.train.load_run import load_model
from tests.ranks.nan_ranks import BAD_STEPS, LIMIT
from tests.runs import complete_lines, digest, run_two_ranks
from tests.tiny import tiny_config, tiny_shards, write_config

pytestmark = pytest.mark.multi_process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folders of `tests.ranks.nan_ranks`, and the shards."""
    folder = tmp_path_factory.mktemp("left_out")
    config = tiny_config(tiny_shards(folder / "shards"))
    file = write_config(folder / "tiny.yaml", config, total_images=224, checkpoint_interval_images=0)
    run_two_ranks("tests.ranks.nan_ranks", file, folder)
    return folder


def test_left_out_updates_are_logged_with_their_samples(folder: Path) -> None:
    lines = complete_lines(folder / "straight" / "metrics.jsonl")
    skipped = [line for line in lines if line["kind"] == "skipped"]
    assert [line["step"] for line in skipped] == [step + 1 for step in BAD_STEPS]
    keys = {open_shards(folder / "shards" / "train").key(index) for index in range(128)}
    for line in skipped:
        assert line["reason"] == "the loss of rank 1 is nan"
        assert list(line["samples"]) == ["1"] and len(line["samples"]["1"]) == 16
        assert set(line["samples"]["1"]) <= keys
    trained = [line["step"] for line in lines if line["kind"] == "train"]
    assert trained == [1, 2, 3, 6, 7]


def test_nothing_of_a_left_out_update_stays(folder: Path) -> None:
    newest = list_checkpoints(folder / "straight" / "checkpoints")[0]
    assert read_state(newest)["ema_updates"] == 5
    assert load_file(newest / "optimizer.safetensors")["step"] == 5
    for name in ("weights", "optimizer", "ema"):
        assert all(torch.isfinite(value).all() for value in load_file(newest / f"{name}.safetensors").values())


def test_a_run_stopped_among_left_out_updates_continues_to_the_same_bits(folder: Path) -> None:
    assert digest(folder / "resumed") == digest(folder / "straight")
    first = list_checkpoints(folder / "resumed" / "checkpoints")[-1]
    assert (read_state(first)["step"], read_state(first)["skipped_steps"]) == (BAD_STEPS[0] + 1, 1)


def test_too_many_in_a_row_end_the_run_on_all_ranks_with_the_same_words(folder: Path) -> None:
    texts = [(folder / f"lost.{rank}.txt").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("the loss of rank 1 is nan at 160 samples seen, and 3 updates in a row were left out")
    assert f"train.max_skipped_steps={LIMIT}" in texts[0] and "samples of rank 1: " in texts[0]
    lines = [json.loads(line) for line in (folder / "lost" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "skipped"] == [3, 4, 5]


def test_a_gradient_that_is_not_finite_names_its_classes_and_suspects_every_rank() -> None:
    step: Any = SimpleNamespace(micro_batches=[SimpleNamespace(indices=torch.tensor([4, 2]))])
    shards: Any = SimpleNamespace(key="image{}".format)
    norms = GradientNorms(by_class={"tied": math.inf, "residual": 1.0, "stem_head": math.nan}, unused=frozenset())
    what = left_out(step, shards, rank_losses=[0.5, 0.7], norms=norms, is_overflow=False)
    assert what.reason == "the gradient of the classes tied, stem_head is not finite"
    assert what.samples == {"0": ["image4", "image2"], "1": ["image4", "image2"]}


def test_the_last_average_has_statistics_that_one_rank_measures_alike(folder: Path) -> None:
    newest = list_checkpoints(folder / "straight" / "checkpoints")[0]
    saved = load_file(newest / "ema_statistics.safetensors")
    config = from_yaml(folder / "tiny.yaml")
    model = config.model.build()
    model.load_state_dict(load_file(newest / "ema.safetensors"))
    averaged = {name: value.clone() for name, value in model.named_buffers() if name in saved}
    alone = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    measured = measured_statistics(model.eval(), open_shards(folder / "shards" / "train"), config, alone)
    assert measured.keys() == saved.keys() and len(saved) == 6
    for name, value in measured.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(averaged[name], value, rtol=0.01), "nothing was measured"
    (folder / "straight" / "config.yaml").write_text((folder / "tiny.yaml").read_text())
    loaded, kind, _ = load_model(folder / "straight", None, print)
    assert kind == "ema"
    assert torch.equal(loaded.get_buffer("stem.norms.1.running_var"), saved["stem.norms.1.running_var"])


def test_statistics_are_measured_once_though_the_end_saves_and_evaluates_and_a_restart_does_again(folder: Path) -> None:
    for rank in range(2):
        assert (folder / "straight" / f"measured.{rank}").read_text() == "measured\n"
    lines = complete_lines(folder / "straight" / "metrics.jsonl")
    evaluated = [(line["weights"], line["top1"], line["loss"]) for line in lines if line["kind"] == "eval"]
    assert len(evaluated) == 4 and evaluated[:2] == evaluated[2:]


def test_measured_statistics_are_those_of_all_images_at_once(folder: Path) -> None:
    config = from_yaml(folder / "tiny.yaml")
    config = replace(config, optim=replace(config.optim, ema_statistics_images=64))
    model = config.model.build().eval()
    shards = open_shards(folder / "shards" / "train")
    alone = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    images = torch.cat([batch.images for batch in training_batches(shards, config, alone)]).float() / 255
    measured = measured_statistics(model, shards, config, alone)
    assert len(images) == 64
    with torch.no_grad():
        x_BCHW = model.stem.convs[0](normalise(images, config.train.image_mean, config.train.image_std))
        first_BCHW, name = x_BCHW, "stem.norms.0.running_mean"
        torch.testing.assert_close(measured[name], first_BCHW.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
        x_BCHW = model.stem.convs[1](torch.relu(model.stem.norms[0](x_BCHW)))
    for name, layer_BCHW in (("stem.norms.0", first_BCHW), ("stem.norms.1", x_BCHW)):
        expected = layer_BCHW.var(dim=(0, 2, 3))
        torch.testing.assert_close(measured[f"{name}.running_var"], expected, rtol=1e-4, atol=1e-5)
