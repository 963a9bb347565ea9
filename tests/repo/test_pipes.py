"""A pipe or a device where a command expects a file is an error at once, with its name; shards have their own test."""

import os
import shutil
from pathlib import Path

import pytest

from sret_scale.cli import main
from tests.hand_made import make_labels, make_run
from tests.tiny import tiny_config, tiny_shards

COMMANDS: dict[str, tuple[str, ...]] = {
    "a configuration": ("train", "PIPE", "--dry-run"),
    "a configuration of DeepSpeed": ("train", "demo_control_20", "engine.ds_config=PIPE", "--dry-run"),
    "a hostfile": ("train", "demo_control_20", "--hostfile", "PIPE", "--dry-run"),
    "first weights": ("train", "RUN/config.yaml", "train.initial_weights=PIPE", "--run", "OUT", "--dry-run"),
    "a sweep": ("sweep", "PIPE", "--dry-run"),
    "published weights": ("weights", "import", "PIPE", "OUT", "--preset", "sret_t"),
    "own weights": ("export", "PIPE", "OUT", "--format", "safetensors"),
    "an image": ("predict", "RUN", "PIPE"),
}
WITHIN = {
    **{f"store/{name}": ("labels", "info", "STORE") for name in ("plan.json", "header.json")},
    **{f"run/{name}": ("report", "RUN", "-o", "OUT") for name in ("config.yaml", "model.json", "environment.json")},
    **{
        f"run/{name}": ("evaluate", "RUN")
        for name in (
            "classes.json",
            "checkpoints/step-000000001/state.json",
            "checkpoints/step-000000001/ema.safetensors",
        )
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    config = tiny_config(tiny_shards(folder / "shards"))
    make_run(folder / "run", config)
    make_labels(folder / "store", folder / "shards" / "train", config)
    (folder / "sweep.yaml").write_text("base: run/config.yaml\ngrid: {model.stages.1.num_loops: [2, 4]}\n")
    return folder


def _assert_refused(folder: Path, command: tuple[str, ...], pipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"PIPE": pipe, "SWEEP": folder / "sweep.yaml", "STORE": folder / "store", "OUT": folder / "out"}
    places["RUN"] = folder / "run"
    words = list(command)
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    status, output = main(words), "".join(capsys.readouterr())
    is_named = pipe.name in output or str(pipe.parent) in output
    assert status == 2 and is_named and "Traceback" not in output, output


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("what", COMMANDS)
def test_what_an_argument_names(
    made: Path, tmp_path: Path, what: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "odd"
    os.mkfifo(pipe) if kind == "pipe" else pipe.symlink_to("/dev/zero")
    _assert_refused(made, COMMANDS[what], pipe, capsys)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", WITHIN)
def test_what_a_folder_holds(made: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "made"))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    _assert_refused(folder, WITHIN[name], folder / name, capsys)
