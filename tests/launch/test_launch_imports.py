"""No file of the working folder takes the place of a module; the user's own modules are found there all the same."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.user_functions import import_of_user
from sret_scale import __version__
from sret_scale.config.recipes import configuration
from sret_scale.runs.run_folder import _commit
from tests.data.shard_sources import make_tree
from tests.runs import complete_lines
from tests.tiny import ROOT, sret_scale, tiny_config, tiny_shards, write_config

# Modules of Python and of libraries, ours, and what is imported only where it is there.
SHADOWS = ("random", "queue", "yaml", "sret_scale", "data_pipelines", "apex", "utils")
OWN = """
import os, utils_of_mine

def darker(image_CHW, seed):
    (utils_of_mine.FOLDER / f"called-{os.getpid()}").touch()
    return image_CHW // 2
"""


@pytest.fixture
def shadowed(tmp_path: Path) -> Path:
    """A working folder with files that raise when they are imported, and with a transform that does not."""
    folder = tmp_path / "here"
    folder.mkdir()
    for name in SHADOWS:
        (folder / f"{name}.py").write_text("raise RuntimeError('imported from the working folder')")
    (folder / "mine.py").write_text(OWN)
    (folder / "utils_of_mine.py").write_text("import pathlib\nFOLDER = pathlib.Path(__file__).parent\n")
    return folder


@pytest.mark.multi_process
def test_a_run_imports_its_own_code_and_the_users_transform_last(shadowed: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_shards(tmp_path / "shards"))
    file = write_config(tmp_path / "tiny.yaml", config, total_images=96)
    own = ["data.transform=mine:darker", "data.worker_kind=processes"]
    process = sret_scale("train", file, *own, "--run", tmp_path / "run", cwd=shadowed)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert [line["images"] for line in complete_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    assert list(shadowed.glob("called-*"))
    assert configuration(str(tmp_path / "run" / "config.yaml")).data.transform == "mine:darker"
    assert recorded(tmp_path / "run") == (without_changes(_commit()), __version__)


def recorded(run: Path) -> tuple[str, str]:
    """The commit and the version that a run folder says its code has."""
    content = json.loads((run / "environment.json").read_text())
    return without_changes(content["commit"]), content["versions"]["sret-scale"]


def without_changes(commit: str | None) -> str:
    """The commit alone, since somebody may edit the tree while the tests run; nothing outside a checkout."""
    return (commit or "").removesuffix("+changes")


@pytest.mark.multi_process
def test_inside_another_checkout_the_code_of_the_command_runs_and_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    for package in ("sret_scale", "data_pipelines", "ds_configs"):
        shutil.copytree(ROOT / package, other / package, ignore=shutil.ignore_patterns("__pycache__"))
    mark = f"\nimport pathlib\npathlib.Path({str(tmp_path)!r}, 'ran-the-other').touch()\n"
    for name in ("sret_scale/train/loop.py", "sret_scale/__init__.py", "data_pipelines/__init__.py"):
        with (other / name).open("a") as stream:
            stream.write(mark)
    author = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    for command in (("init", "-q"), ("add", "sret_scale/cli.py"), (*author, "commit", "-q", "-m", "another one")):
        subprocess.run(["git", *command], cwd=other, check=True)
    ours = without_changes(_commit())
    # As where a hook of that repository starts the run.
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    file = write_config(tmp_path / "tiny.yaml", tiny_config(tiny_shards(tmp_path / "shards")), total_images=96)
    process = sret_scale("train", file, "--run", tmp_path / "run", cwd=other)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert not (tmp_path / "ran-the-other").exists()
    assert recorded(tmp_path / "run") == (ours, __version__)


@pytest.mark.multi_process
def test_shards_are_written_in_such_a_folder(shadowed: Path, tmp_path: Path) -> None:
    source = make_tree(tmp_path / "images")
    words = ("shards", "write", "folder", source, tmp_path / "out", "--workers", "2", "--shard-samples", "4")
    process = sret_scale(*words, cwd=shadowed)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error


def test_a_users_module_is_looked_up_on_the_path_and_then_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, path = tmp_path / "here", tmp_path / "path"
    for folder, names in ((here, ("both_of_mine", "only_here_of_mine")), (path, ("both_of_mine",))):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.py").write_text("")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [*sys.path, str(path)])
    assert import_of_user("both_of_mine").__file__ == str(path / "both_of_mine.py")
    assert import_of_user("only_here_of_mine").__file__ == str(here / "only_here_of_mine.py")
    assert sys.path.count(str(here)) == 1 and sys.path[-1] == str(here)


def test_every_python_that_is_started_leaves_the_working_folder_out() -> None:
    for package in ("sret_scale", "data_pipelines"):
        for file in (ROOT / package).rglob("*.py"):
            if file == ROOT / "data_pipelines" / "extras.py":
                continue  # Prints the command that installs a package, for people, and starts nothing.
            for command in re.findall(r"sys\.executable, .*", file.read_text(encoding="utf-8")):
                assert '"-P"' in command, f"{file}: {command}"
