"""Class names belong to a run: sets and teachers of other classes are refused, and a split may lack some."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.shards.classes import renumbered
from data_pipelines.shards.index import ShardSet, open_shards
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.cli import main
from sret_scale.config.run_config import RunConfig
from sret_scale.launch.doctor.inputs import check_teacher
from sret_scale.model import SReT
from sret_scale.runs.checkpoint import list_checkpoints, read_state, save_checkpoint
from sret_scale.train.load_run import load_class_names
from tests.data.shard_sources import encoded, pixels
from tests.forked import sret_scale_forked
from tests.hand_made import make_run
from tests.tiny import TINY_MODEL, tiny_config, write_config

CLASSES = ["ant", "bee", "cow"]
Refuse = Callable[..., str]


def written(folder: Path, names: dict[str, str], num_images: int = 6) -> Path:
    """Shards in `folder` of an image folder: name there -> the animal on the pictures."""
    for name, animal in names.items():
        (folder / "images" / name).mkdir(parents=True)
        for index in range(num_images):
            picture = encoded(pixels(100 * CLASSES.index(animal) + index, 28, 28), "PNG")
            (folder / "images" / name / f"{animal}{index}.png").write_bytes(picture)
    write_shards(WriteConfig(kind="folder", source=folder / "images"), folder / "shards")
    return folder / "shards"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`train`; `numbers`, as many classes of other names; `two`, which lacks one; `strange`, with one too many."""
    folder = tmp_path_factory.mktemp("sets")
    names = {
        "train": {name: name for name in CLASSES},
        "numbers": {"0": "cow", "10": "ant", "2": "bee"},
        "two": {"ant": "ant", "cow": "cow"},
        "strange": {**{name: name for name in CLASSES}, "dog": "cow"},
    }
    return {kind: written(folder / kind, classes) for kind, classes in names.items()}


def config_of(sets: dict[str, Path], test: str = "train") -> RunConfig:
    config = tiny_config(Path())
    data = replace(config.data, train_folder=str(sets["train"]), test_folder=str(sets[test]))
    batch = replace(config.train, total_images=16, global_batch_size=8, micro_batch_size=4)
    optim = replace(config.optim, warmup_images=0)
    return replace(config, model=replace(TINY_MODEL, num_classes=3), data=data, train=batch, optim=optim)


@pytest.fixture(scope="module")
def run(sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", config_of(sets))


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    def refused(*arguments: object) -> str:
        assert main(list(map(str, arguments))) == 2
        return capsys.readouterr().err

    return refused


def test_labels_are_found_by_name(sets: dict[str, Path]) -> None:
    two = open_shards(sets["two"])
    shards: ShardSet = renumbered(two, CLASSES, "the test")
    assert shards.class_names == CLASSES and set(shards.label.tolist()) == {0, 2}
    for index in range(shards.num_samples):
        assert shards.key(index).startswith(CLASSES[shards.label[index]])
    assert renumbered(two, ["ant", "cow"], "the test") is two
    # The names of a set say what its numbers mean, in whatever order they come.
    assert np.array_equal(renumbered(two, ["cow", "ant"], "the test").label, 1 - two.label)


def test_a_set_of_as_many_other_classes_is_refused_in_evaluate(
    sets: dict[str, Path], run: Path, refuse: Refuse
) -> None:
    for more in ([], ["--early-exit", "confidence"]):
        error = refuse("evaluate", run, "--shards", sets["numbers"], *more)
        assert f"other classes than the run {run}: class 0: expected 'ant', got '0'" in error
    error = refuse("evaluate", run, "--shards", sets["strange"])
    assert "4, expected the 3 there or some of them; class 3, 'dog', is none of these" in error


def test_a_split_that_lacks_a_class_is_evaluated(
    sets: dict[str, Path], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def top1(shards: str) -> dict[str, Any]:
        assert main(["evaluate", str(run), "--shards", str(sets[shards]), "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    two, whole = top1("two"), top1("train")
    assert two["classes_without_samples"] == ["bee"] and whole["classes_without_samples"] == []
    # The untrained model answers with one class for nearly all: numbers that are shifted would be right elsewhere.
    with_bees = two["loss"] * 12 + _loss_of_bees(run, sets) * 6
    assert with_bees == pytest.approx(whole["loss"] * 18, rel=1e-4)
    assert main(["evaluate", str(run), "--shards", str(sets["two"])]) == 0
    assert "has no sample of 1 class: 'bee'" in capsys.readouterr().out


def _loss_of_bees(run: Path, sets: dict[str, Path]) -> float:
    from sret_scale.train.distributed import ranks_from_environment
    from sret_scale.train.evaluate import evaluate
    from sret_scale.train.load_run import load_config, load_model

    shards = open_shards(sets["train"])
    rows = np.flatnonzero(shards.label == 1)
    arrays = {name: getattr(shards, name)[rows] for name in ("shard_of", "offset", "length", "label", "crc")}
    arrays |= {name: getattr(shards, name)[rows] for name in ("width", "height", "record_offset", "frame_crc")}
    model, _, _ = load_model(run, None, print)
    found = evaluate(model, replace(shards, **arrays), load_config(run), ranks_from_environment())
    assert found is not None and found.num_samples == 6
    return found.numbers["loss"]


def test_a_run_of_the_first_version_takes_the_names_of_its_training_shards(
    sets: dict[str, Path], run: Path, tmp_path: Path, refuse: Refuse, capsys: pytest.CaptureFixture[str]
) -> None:
    old = shutil.copytree(run, tmp_path / "old")
    (old / "classes.json").unlink()
    assert load_class_names(old) == CLASSES
    assert "expected 'ant', got '0'" in refuse("evaluate", old, "--shards", sets["numbers"])
    gone = json.dumps(str(sets["train"]))[1:-1]
    for file in (old / "config.yaml",):
        file.write_text(file.read_text().replace(f"train_folder: {gone}", "train_folder: /nowhere"))
    assert load_class_names(old) is None
    # Nobody knows better.
    assert main(["evaluate", str(old), "--shards", str(sets["numbers"])]) == 0
    capsys.readouterr()
    assert "has 2 classes, the model of" in refuse("evaluate", old, "--shards", sets["two"])


@pytest.mark.lengthy
@pytest.mark.parametrize("content", ["", "{}", '["ant", "bee"]', '["ant", "bee", 3]', '["ant", "bee", "bee"]', "[" * 9])
def test_a_damaged_list_of_classes_is_named(run: Path, tmp_path: Path, refuse: Refuse, content: str) -> None:
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / "classes.json").write_text(content)
    assert "classes.json" in refuse("evaluate", damaged)


@pytest.mark.lengthy
def test_names_travel_with_checkpoints_and_exports(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(run, tmp_path / "moved")
    (moved / "classes.json").unlink()
    state = {**read_state(list_checkpoints(moved / "checkpoints")[0]), "class_names": ["x", "y", "z"]}
    step = int(state.pop("step")) + 1
    weights = SReT(replace(TINY_MODEL, num_classes=3)).state_dict()
    save_checkpoint(moved / "checkpoints", step=step, tensors={"weights": weights}, state=state)
    assert load_class_names(moved) == ["x", "y", "z"]
    native, deeper = tmp_path / "run.safetensors", tmp_path / "deeper.safetensors"
    assert main(["export", str(run), str(native), "--format", "safetensors"]) == 0
    assert main(["weights", "grow", str(run), str(deeper), "--loops", "4"]) == 0
    assert load_class_names(native) == load_class_names(deeper) == CLASSES
    # A native file hands them on.
    assert main(["export", str(native), str(tmp_path / "run.pt2"), "--format", "torch"]) == 0
    files = {"class_names.json": ""}
    torch.export.load(tmp_path / "run.pt2", extra_files=files)
    assert json.loads(files["class_names.json"]) == CLASSES
    capsys.readouterr()


@pytest.mark.lengthy
def test_names_are_in_an_onnx_file(run: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    assert main(["export", str(run), str(tmp_path / "run.onnx")]) == 0
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "run.onnx").metadata_props}
    assert json.loads(metadata["class_names"]) == CLASSES


def test_a_teacher_run_of_other_classes_is_refused(
    sets: dict[str, Path], run: Path, tmp_path: Path, refuse: Refuse
) -> None:
    spec = f"run:{run}"
    expected = f"teacher {spec}: other classes than the data: class 0: expected '0', got 'ant'"
    config = config_of(sets)
    other = str(sets["numbers"])
    config = replace(
        config,
        data=replace(config.data, train_folder=other, test_folder=other),
        distill=replace(config.distill, teacher=spec),
    )
    file = write_config(tmp_path / "student.yaml", config)
    assert expected in refuse("train", file, "--run", tmp_path / "student", "--ranks", 1)
    labels = ["--teacher", spec, "--views", 1, "--top-k", 2, "--image-size", 28]
    assert expected in refuse("labels", "write", other, tmp_path / "labels", *labels)
    finding = check_teacher(spec, ["0", "10", "2"])
    assert (finding.state, finding.text) == ("fail", expected)
    assert check_teacher(spec, CLASSES).state == "ok"


@pytest.mark.multi_process
def test_training_names_its_classes_and_evaluates_on_a_split_that_lacks_one(
    sets: dict[str, Path], tmp_path: Path, refuse: Refuse
) -> None:
    file, run = write_config(tmp_path / "two.yaml", config_of(sets, "two")), tmp_path / "run"
    command = ("train", file, "--run", run, "--ranks", "1")
    dry = sret_scale_forked(*command, "--dry-run", cwd=tmp_path)
    ended = sret_scale_forked(*command, cwd=tmp_path)
    for one in (dry, ended):
        assert one.returncode == 0, one
        assert "has no sample of 1 class: 'bee'" in one.stdout
    assert json.loads((run / "classes.json").read_text()) == CLASSES
    assert read_state(list_checkpoints(run / "checkpoints")[0])["class_names"] == CLASSES
    # The same folder with other shards at the same place, which a run without a checkpoint would not notice.
    (run / "status.json").unlink()
    (run / "classes.json").write_text('["bee", "ant", "cow"]')
    assert f"other classes than the run {run}: class 0: expected 'bee', got 'ant'" in refuse(*command)
    error = refuse("train", file, f"data.test_folder={sets['numbers']}", "--run", tmp_path / "other", "--ranks", "1")
    assert "class 0: expected 'ant', got '0'" in error
