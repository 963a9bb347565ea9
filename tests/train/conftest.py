"""What tests of trained runs share: pictures of three classes, and a run that does not answer all of them alike."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sret_scale
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.runs.checkpoint import list_checkpoints, read_state, save_checkpoint
from sret_scale.train.load_run import load_facts, load_trained
from tests.data.shard_sources import encoded, pixels
from tests.hand_made import make_run
from tests.tiny import TINY_MODEL, tiny_config

CLASSES = ["ant", "bee", "cow"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures a class, of other sizes than the model's."""
    folder = tmp_path_factory.mktemp("photos")
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for index in range(8):
            data = encoded(pixels(100 * label + index, 40 + index, 48 - 2 * index), "PNG")
            (folder / name / f"{index}.png").write_bytes(data)
    return folder


@pytest.fixture(scope="session")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_shards(WriteConfig(kind="folder", source=photos), folder / "shards")
    config = tiny_config(Path())
    shards = str(folder / "shards")
    data = replace(config.data, train_folder=shards, test_folder=shards, eval_crop_rate=0.875)
    batch = replace(config.train, global_batch_size=8, micro_batch_size=4, image_mean=MEAN, image_std=STD)
    model = replace(TINY_MODEL, num_classes=3)
    run = make_run(folder / "run", replace(config, model=model, data=data, train=batch))
    answering_unlike(run, [file.read_bytes() for file in sorted(photos.rglob("*.png"))])
    return run


def answering_unlike(run: Path, images: list[bytes]) -> None:
    """A second checkpoint, of weights that do not give one answer to all images, as untrained ones do."""
    model, facts = load_trained(run), load_facts(run)
    trained = sret_scale.load(run)
    with torch.no_grad():
        scores_BC = trained.probabilities(torch.stack([trained.preprocessing.pixels(data) for data in images])).log()
        model.head.bias.sub_(scores_BC.mean(0))
    state = {**read_state(list_checkpoints(run / "checkpoints")[0]), **facts, "step": 2}
    step, tensors = int(state.pop("step")), dict.fromkeys(("weights", "ema"), model.state_dict())
    save_checkpoint(run / "checkpoints", step=step, tensors=tensors, state=state)
