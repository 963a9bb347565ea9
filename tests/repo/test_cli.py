"""The command line itself: what its errors look like, and what it does with a folder where a file is wanted."""

import errno
import json
from pathlib import Path

import pytest

from sret_scale.cli import main
from sret_scale.commands.arguments import parsed
from sret_scale.config.fields import fields_of
from sret_scale.config.run_config import RunConfig
from sret_scale.runs.rank_errors import in_words
from tests.tiny import ROOT


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.yaml"), "a.yaml: No such file or directory"),
        (OSError(errno.EACCES, "cannot make the folder b: choose another"), "cannot make the folder b: choose another"),
        (OSError("host c has no address"), "host c has no address"),
        (ValueError("expected 1, got 2"), "expected 1, got 2"),
        (ValueError(f"a.yaml: {'9' * 9000} is none"), f"a.yaml: {'9' * 992} [...] {'9' * 992} is none"),
    ],
)
def test_errors_are_said_without_pythons_numbers(error: Exception, words: str) -> None:
    assert in_words(error) == words


def test_a_wrong_command_gets_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'trian': did you mean train? see sret-scale --help\n"


@pytest.mark.lengthy
def test_the_page_of_settings_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    page = capsys.readouterr().out
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == page
    without = [field.name for field in fields_of(RunConfig) if not field.meaning]
    assert without == [] and page.count("\n- `") == len(list(fields_of(RunConfig)))
    assert main(["config", "optim"]) == 0
    assert capsys.readouterr().out in page
    assert main(["config", "optm"]) == 2
    assert capsys.readouterr().err == "error: no section 'optm': did you mean optim?\n"


def test_loops_of_all_stages_in_describe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "sret_t", "model.num_loops=4", "--json"]) == 0
    assert [stage["loops"] for stage in json.loads(capsys.readouterr().out)["stages"]] == [4, 4, 4]
    assert main(["describe", "sret_tt"]) == 2
    assert "did you mean 'sret_t'" in capsys.readouterr().err


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
        (["train", "other.yaml"], "error: other.yaml: unknown key 'train.sed': did you mean 'train.seed'?"),
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


def test_options_may_stand_between_a_commands_folders() -> None:
    for words in (["folder", "a", "--split", "0.1", "b"], ["--split", "0.1", "folder", "a", "b"]):
        found = parsed("shards", ["write", *words])
        assert (found.kind, found.source, found.target, found.split) == ("folder", Path("a"), Path("b"), "0.1")
