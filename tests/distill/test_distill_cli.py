"""`sret-scale labels` from the command line, on real photographs in shards."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.cli import main
from tests.data.stream_shards import jpeg, smooth_image

CLASSES = ("ant", "bee", "cow", "dog")


def four_classes() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    """A teacher for `module:`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(100, 4)), (0.5,) * 3, (0.5,) * 3, 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("images")
    for number in range(12):
        path = folder / "images" / CLASSES[number % 4] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(smooth_image(30, 40, number)))
    config = WriteConfig(kind="folder", source=folder / "images", shard_samples=5)
    write_shards(config, folder / "shards", num_workers=1)
    return str(folder / "shards")


TEACHER = f"module:{__name__}:four_classes"


def write(shards: str, folder: Path, *more: str, teacher: str = TEACHER) -> int:
    numbers = ["--teacher", teacher, "--views", "2", "--top-k", "3", "--image-size", "16", "--batch-size", "4"]
    return main(["labels", "write", shards, str(folder), *numbers, *more])


def test_write_info_verify(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "store"
    assert write(shards, folder, "--set", "data.crop_scale=[0.5,1.0]", "--set", "data.view_seed=3") == 0
    said = capsys.readouterr().out
    assert f"distill.teacher=labels:{folder}" in said and "data.num_views=2 data.view_seed=3" in said
    assert main(["labels", "info", str(folder)]) == 0
    assert "12 samples x 2 views" in capsys.readouterr().out
    assert main(["labels", "info", str(folder), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["bytes_per_view"] == 23 and values["view"]["crop_scale"] == [0.5, 1.0]
    assert 0 < values["coverage"]["mass"] < 1
    verify = ["labels", "verify", str(folder), shards, "--teacher", TEACHER]
    assert main([*verify, "--records", "24"]) == 0
    assert "24 records compared" in capsys.readouterr().out
    assert main([*verify, "--tolerance", "0"]) == 1


def test_write_shows_progress_and_what_is_left(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sret_scale.train.progress.LOG_INTERVAL_S", 0.0)
    assert write(shards, tmp_path / "store") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("labels, counting views: ")]
    # Two views of each of 12 images, in batches of 4.
    assert len(lines) == 6 and " 4 of 24 samples" in lines[0] and " 24 of 24 samples" in lines[-1]
    assert all(line.endswith(" left") for line in lines) and lines[-1].endswith(" 0:00 left")


def test_two_ranks_write_one_store(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in ("1", "0"):
        assert write(shards, tmp_path / "by two", "--rank", rank, "--world-size", "2") == 0
    assert "other ranks have files to write" in capsys.readouterr().out
    assert write(shards, tmp_path / "by one") == 0
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("by two", "by one")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("more", "teacher", "message"),
    [
        (("--top-k", "9"), "", "expected top_k from 1 to 4, got 9"),
        (("--rank", "2", "--world-size", "2"), "", "--rank: expected 0 to 1, got 2"),
        (("--set", "data.crp=padded"), "", "did you mean 'data.crop'"),
        ((), "efficientnet-lite3", "did you mean efficientnet-lite"),
        ((), "efficientnet-lite0", "has 1000 outputs, the data has 4 classes"),
        ((), "labels:somewhere", "stored labels cannot answer"),
    ],
)
def test_bad_input_is_an_error_of_one_line(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], teacher: str, message: str
) -> None:
    assert write(shards, tmp_path / "store", *more, teacher=teacher or TEACHER) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_missing_store_and_shards_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["labels", "info", str(tmp_path / "gone")]) == 2
    assert "no store of soft labels" in capsys.readouterr().err
    assert write(str(tmp_path / "none"), tmp_path / "store") == 2
    assert "no such shard folder" in capsys.readouterr().err
