"""A loss that is not a number on one rank: the update is left out on all, and a run continues exactly from there."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipelines.index import open_shards
from sret_scale.train.checkpoint import list_checkpoints, read_state
from tests.nan_ranks import BAD_STEPS, LIMIT
from tests.runs import complete_lines, digest, run_two_ranks
from tests.tiny import tiny_config, tiny_shards, write_config

pytestmark = pytest.mark.multi_process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folders of `tests.nan_ranks`, and the shards."""
    folder = tmp_path_factory.mktemp("left_out")
    config = tiny_config(tiny_shards(folder / "shards"))
    file = write_config(folder / "tiny.yaml", config, total_images=224, checkpoint_interval_images=0)
    run_two_ranks("tests.nan_ranks", file, folder)
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
    assert texts[0].startswith("the loss of rank 1 is nan at 160 images seen, and 3 updates in a row were left out")
    assert f"train.max_skipped_steps={LIMIT}" in texts[0] and "samples of rank 1: " in texts[0]
    lines = [json.loads(line) for line in (folder / "lost" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "skipped"] == [3, 4, 5]
