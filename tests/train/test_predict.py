"""Answers of a trained run: the same from its folder, its checkpoint and every export, as `evaluate` counts them."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import sret_scale
from sret_scale.cli import main
from sret_scale.model.vision.weight_files import save_model
from sret_scale.runs.checkpoint import list_checkpoints
from sret_scale.train.load_run import load_facts, load_trained
from tests.data.shard_sources import encoded, pixels
from tests.tiny import ROOT
from tests.train.conftest import CLASSES, MEAN, STD


def answers(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, dict[str, float]]:
    """Image -> class -> probability, as `predict --json` says."""
    capsys.readouterr()
    assert main(["predict", *map(str, words), "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return {one["image"]: {entry["class"]: entry["probability"] for entry in one["classes"]} for one in found}


def accuracy(found: dict[str, dict[str, float]]) -> float:
    return float(np.mean([next(iter(classes)) == Path(file).parent.name for file, classes in found.items()]))


def test_predict_is_right_as_often_as_evaluate_says(
    run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answers(capsys, run, photos)
    assert len(found) == 24 and list(found) == sorted(found)
    assert len({next(iter(classes)) for classes in found.values()}) > 1
    assert main(["evaluate", str(run), "--json"]) == 0
    assert accuracy(found) == json.loads(capsys.readouterr().out)["top1"]
    for classes in found.values():
        assert sum(classes.values()) == pytest.approx(1, abs=1e-5)
        assert list(classes.values()) == sorted(classes.values(), reverse=True)


def test_features_are_what_the_head_sees(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"none")
    file = tmp_path / "features.npz"
    assert main(["predict", str(run), str(photos), str(tmp_path / "bad.jpg"), "--features", str(file)]) == 2
    assert "bad.jpg: " in capsys.readouterr().err
    found, model = np.load(file, allow_pickle=False), sret_scale.load(run)
    expected = model.predict(found["images"][5], top=3)
    assert found["features"].shape == (24, model.model.config.stages[-1].width)
    scores_NC = model.model.head(torch.from_numpy(found["features"]))
    value, index = scores_NC.softmax(dim=1)[5].max(dim=0)
    assert model.class_names[int(index)] == expected[0][0] and value.item() == pytest.approx(expected[0][1], abs=1e-6)
    assert torch.allclose(model.features(found["images"][5]), torch.from_numpy(found["features"][5]), atol=1e-6)


@pytest.mark.lengthy
def test_what_an_answer_needs_travels_with_the_checkpoint_and_every_export(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads(json.dumps(load_facts(run)))
    assert facts["class_names"] == CLASSES and facts["preprocessing"] == {
        **{"resize": 32, "crop": 28, "interpolation": "bicubic"},
        **{"mean": list(MEAN), "std": list(STD)},
    }
    # Where nothing else of the run is.
    alone = shutil.copytree(list_checkpoints(run / "checkpoints")[0], tmp_path / "alone")
    native, program, onnx = (tmp_path / name for name in ("native.safetensors", "program.pt2", "program.onnx"))
    assert main(["export", str(run), str(native), "--format", "safetensors"]) == 0
    assert main(["export", str(native), str(program), "--format", "torch"]) == 0
    assert main(["export", str(alone), str(onnx)]) == 0
    expected = answers(capsys, run, photos)
    assert answers(capsys, alone, photos) == expected == answers(capsys, native, photos)
    files = dict.fromkeys((f"{name}.json" for name in facts), "")
    torch.export.load(program, extra_files=files)
    assert {name: json.loads(files[f"{name}.json"]) for name in facts} == facts
    session = onnxruntime.InferenceSession(str(onnx))
    said = session.get_modelmeta().custom_metadata_map
    assert {name: json.loads(said[name]) for name in facts} == facts
    assert session.get_inputs()[0].shape == ["batch", 3, 28, 28]


@pytest.mark.multi_process
def test_the_example_of_onnxruntime_is_right_as_often_as_evaluate_says(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), str(tmp_path / "model.onnx")]) == 0
    text = (ROOT / "docs" / "use.md").read_text()
    example = re.search(r"```python\n(import json.*?)```", text, re.DOTALL)
    assert example
    (tmp_path / "example.py").write_text(example.group(1))
    expected, files = answers(capsys, run, photos), sorted(photos.rglob("*.png"))
    words = [sys.executable, "example.py", "model.onnx", *map(str, files)]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = {line.split(": ")[0]: {line.split(": ")[1]: 1.0} for line in result.stdout.splitlines()}
    assert len(found) == 24 and accuracy(found) == accuracy(expected)


def test_three_lines_of_python(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = photos / "ant" / "0.png"
    model = sret_scale.load(run)
    found = model.predict(file, top=2)
    assert len(found) == 2 and model.predict(file.read_bytes())[:2] == found
    assert {name: round(value, 6) for name, value in found} == answers(capsys, run, file, "--top", 2)[str(file)]
    with pytest.raises(FileNotFoundError):
        model.predict(photos / "none.png")
    with pytest.raises(FileNotFoundError, match="no such run folder, checkpoint or file of safetensors"):
        sret_scale.load(photos / "no run")


@pytest.mark.multi_process
def test_importing_the_package_is_cheap() -> None:
    code = "import sys, sret_scale; assert 'load' in dir(sret_scale); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "False\n"
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        sret_scale.lod  # noqa: B018


def test_patterns_tables_and_bad_images(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = shutil.copytree(photos / "bee", tmp_path / "pictures")
    (pictures / "notes.txt").write_text("no image")
    (pictures / ".trash").mkdir()
    (pictures / ".trash" / "9.png").write_bytes(b"")
    (pictures / "1.png").write_text("no image")
    assert main(["predict", str(run), str(pictures), "--csv", "--top", "2"]) == 2
    printed = capsys.readouterr()
    rows = list(csv.reader(io.StringIO(printed.out)))
    assert rows[0] == ["image", "class_1", "probability_1", "class_2", "probability_2"]
    assert [Path(row[0]).name for row in rows[1:]] == [f"{index}.png" for index in (0, 2, 3, 4, 5, 6, 7)]
    assert printed.err.splitlines() == [f"error: {pictures / '1.png'}: not an image, or its header is broken"]
    assert main(["predict", str(run), str(pictures / "[23].png"), "--top", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(pictures / f"{index}.png") for index in (2, 3)]
    assert re.fullmatch(rf"({'|'.join(CLASSES)}) \d+\.\d%", lines[0].partition(": ")[2])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["RUN", "none.png"], "none.png: No such file"),
        (["RUN", "*.jpeg"], "no images *.jpeg"),
        (["RUN", "empty"], "no images empty"),
        (["RUN", "a.png", "--top", "0"], "--top: expected at least 1, got 0"),
        (["empty", "a.png"], "empty is not a run folder"),
        (["a.png", "a.png"], "is not a complete safetensors file"),
    ],
)
def test_what_is_no_run_or_no_image_is_said(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("a.png").write_bytes(encoded(pixels(0, 28, 28), "PNG"))
    assert main(["predict", *(str(run) if word == "RUN" else word for word in words)]) == 2
    assert expected in capsys.readouterr().err


def test_a_file_that_says_nothing_of_its_images_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, damaged = tmp_path / "old.safetensors", tmp_path / "damaged.safetensors"
    facts = load_facts(run)
    save_model(load_trained(run), old, {"class_names": CLASSES})
    for file, change, expected in (
        (old, None, "does not say how its images are prepared"),
        (damaged, {"std": (0, 1, 1)}, "preprocessing: std.0: expected greater than 0"),
        (damaged, {"crop": 40}, "expected a crop within the side of 32 pixels, got 40"),
        (damaged, {"crop": 20}, "expected a model that classifies images of 20 pixels"),
        (damaged, {"resize": 1 << 30}, "preprocessing: resize: expected less than or equal to 16384"),
    ):
        if change:
            save_model(load_trained(run), file, facts | {"preprocessing": facts["preprocessing"] | change})
        assert main(["predict", str(file), "a.png"]) == 2
        assert expected in capsys.readouterr().err
