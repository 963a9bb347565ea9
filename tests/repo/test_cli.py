"""The command line itself: what its errors look like, and what it does with a folder where a file is wanted."""

import errno
from pathlib import Path

import pytest

from sret_scale.cli import main
from sret_scale.runs.rank_errors import in_words


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.yaml"), "a.yaml: No such file or directory"),
        (OSError(errno.EACCES, "cannot make the folder b: choose another"), "cannot make the folder b: choose another"),
        (OSError("host c has no address"), "host c has no address"),
        (ValueError("expected 1, got 2"), "expected 1, got 2"),
    ],
)
def test_errors_are_said_without_pythons_numbers(error: Exception, words: str) -> None:
    assert in_words(error) == words


FILES = {
    "empty.yaml": b"",
    "cut.yaml": b"train: {seed: 1}\ndata: [",
    "twice.yaml": b"train:\n  seed: 1\n  seed: 2\n",
    "binary.yaml": b"\xff\xfe\x00",
    "other.yaml": b"train: {sed: 1}",
}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "missing.yaml"], "error: missing.yaml: No such file or directory"),
        (["train", "runs/old"], "error: runs/old is a folder: expected its configuration, runs/old/config.yaml"),
        (["train", "empty.yaml"], "error: empty.yaml: expected sections of a run configuration, got NoneType"),
        (["train", "cut.yaml"], "error: cut.yaml is not valid YAML in line 2: expected "),
        (["train", "twice.yaml"], "error: twice.yaml line 3: the key 'seed' is given twice"),
        (["train", "binary.yaml"], "error: binary.yaml is not text in UTF-8"),
        (["train", "other.yaml"], "error: other.yaml: unknown key 'train.sed': did you mean 'seed'?"),
        (["train", "sret_t", "train.seed=a"], "error: train.seed: expected a valid integer, got 'a' (str)"),
        (["train", "sret_t", "train.image_mean=[1]"], "error: train.image_mean: expected more values, got [1] (list)"),
        (["checkpoint", "info", "absent"], "error: no run folder absent"),
        (["train", "train.seed=1"], "error: no recipe or model preset 'train.seed=1'"),
        (
            ["labels", "write", "a", "b", "--teacher", "t", "--views", "1", "--top-k", "1", "--recipe", "runs/old"],
            "folder",
        ),
    ],
)
def test_a_wrong_name_file_or_value_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/old").mkdir(parents=True)
    for name, text in FILES.items():
        (tmp_path / name).write_bytes(text)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_no_command_shows_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "\n  train " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"shard_samples": 0}, "shard_samples: expected 1 or more, got 0"),
        ({"shard_mb": -1}, "shard_bytes: expected 1 or more, got -1048576"),
        ({"max_bad_rate": 2}, "max_bad_rate: expected 0 to 1, got 2"),
        ({}, "file: a file, expected a folder"),
    ],
)
def test_shards_write_says_which_option_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, float], expected: str
) -> None:
    (tmp_path / "file").touch()
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["shards", "write", "folder", str(tmp_path), str(tmp_path / "file"), *words]) == 2
    assert expected in capsys.readouterr().err
