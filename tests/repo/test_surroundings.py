"""What surrounds a command changes nothing that it does not ask for: the home folder, its absence, another launcher."""

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from data_pipelines.config import DataConfig
from data_pipelines.home_folder import with_home
from data_pipelines.remote.shard_sets import _cache_root
from sret_scale.cli import main
from sret_scale.config.run_config import RunConfig, from_yaml, override, to_yaml
from sret_scale.lab.experiments.declared import load_experiment
from sret_scale.train.distributed import ranks_from_environment
from tests.data.shard_sources import make_tree
from tests.tiny import environment, tiny_config, tiny_shards, write_config


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and another working folder."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that was started with a user id which has no name."""

    def unknown(_: object) -> NoReturn:
        raise KeyError("uid not found")

    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~/x", "HOME/x"),
        ("--run=~/x", "--run=HOME/x"),
        ("data.train_folder=~/x", "data.train_folder=HOME/x"),
        ("distill.teacher=run:~/a+run:~/b", "distill.teacher=run:HOME/a+run:HOME/b"),
        ("timm:vit?checkpoint=~/v.pth", "timm:vit?checkpoint=HOME/v.pth"),
        *((same, same) for same in ("a~/x", "x/~/y", "./~/x", "~", "https://host/=~/x", "file:///a:~/b")),
    ],
)
def test_a_tilde_that_begins_a_path_is_the_home_folder(home: Path, text: str, expected: str) -> None:
    assert with_home(text) == expected.replace("HOME", str(home))


def test_path_fields_and_files_of_configurations_know_the_tilde(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {train_folder: ~/train, cache_folder: ~}\ntrain: {initial_weights: 'run:~/run'}\n")
    config = override(from_yaml(file), ["data.quarantine_file=~/bad.jsonl"])
    assert (config.data.train_folder, config.data.cache_folder) == (f"{home}/train", None)
    assert (config.train.initial_weights, config.data.quarantine_file) == (f"run:{home}/run", f"{home}/bad.jsonl")
    file.write_text("base: sret_t\ngrid: {data.train_folder: [~/a, ~/b]}\nmatch: equal_images\n")
    _, planned = load_experiment(file, [1])
    assert [run.config.data.train_folder for run in planned] == [f"{home}/a", f"{home}/b"]


def test_a_path_argument_with_a_tilde_is_written_at_home(home: Path, tmp_path: Path) -> None:
    source = make_tree(home / "images")
    assert main(["shards", "write", "folder", f"~/{source.name}", "~/shards", "--workers", "1"]) == 0
    assert (home / "shards" / "manifest.json").exists() and list((tmp_path / "work").iterdir()) == []


@pytest.mark.usefixtures("nobody")
def test_without_a_home_a_message_says_what_to_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="home folder that is not known here: set HOME"):
        _cache_root(DataConfig())
    assert _cache_root(DataConfig(cache_folder=str(tmp_path))) == tmp_path
    assert main(["report", "--output=~/page.html", "runs"]) == 2
    assert capsys.readouterr().err.startswith("error: ~ stands for a home folder that is not known here: set HOME")
    with pytest.raises(ValueError, match="set HOME"):
        override(RunConfig(), ["data.train_folder=~/x"])


# A user id that nothing on the machine knows, as of `docker run --user 54321`.
WITHOUT_A_NAME = ("unshare", "--user", "--map-user=54321", "--map-group=54321")


@pytest.mark.multi_process
def test_a_user_without_a_name_or_a_home_trains_and_evaluates(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run([*WITHOUT_A_NAME, "true"], check=False).returncode:
        pytest.skip("user namespaces are not allowed here")
    variables = {name: value for name, value in environment().items() if name not in ("USER", "LOGNAME", "HOME")}
    variables |= {"HOME": "/nonexistent"}
    config = tiny_config(tiny_shards(tmp_path / "shards"))
    file = write_config(tmp_path / "run.yaml", config, total_images=32, global_batch_size=16, micro_batch_size=16)
    commands = (
        ["train", file, "optim.warmup_images=0", "--run", "run", "--ranks", "1"],
        ["evaluate", "run"],
        ["report", "run", "-o", "page.html"],
    )
    for command in commands:
        started = [*WITHOUT_A_NAME, sys.executable, "-P", "-m", "sret_scale.cli", *map(str, command)]
        done = subprocess.run(started, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)
    assert (tmp_path / "page.html").exists()


def test_configurations_saved_on_windows_are_read(tmp_path: Path) -> None:
    def saved(name: str, text: str) -> Path:
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        return tmp_path / name

    assert from_yaml(saved("run.yaml", to_yaml(RunConfig()))) == RunConfig()
    _, planned = load_experiment(saved("sweep.yaml", "base: run.yaml\ngrid:\n  train.seed: [0, 1]\n"), [1])
    assert [run.config.train.seed for run in planned] == [0, 1]


def test_variables_of_another_launcher_do_not_make_a_command_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.255.255.1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["describe", "sret_t"]) == 0
    ranks = ranks_from_environment()
    assert (ranks.rank, ranks.local_rank, ranks.world_size) == (0, 0, 1)
    assert "RANK" not in os.environ
