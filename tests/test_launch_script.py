"""launch.sh from outside: help, wrong commands, which Python it takes, what it says when something is missing."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What the script needs besides Python; a PATH with only these has no Python at all.
TOOLS = ("bash", "env", "readlink", "dirname", "cat", "grep", "sed", "sha256sum", "rm", "mkdir", "ls", "tail", "sleep")


def run(script: Path, *arguments: str, cwd: Path, path: str | None = None) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PATH": os.environ["PATH"] if path is None else path}
    return subprocess.run(
        [str(script), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The script with what it reads, in a folder with a space."""
    folder = tmp_path / "a folder"
    (folder / "sret_scale").mkdir(parents=True)
    for name in (
        "launch.sh",
        "constraints.txt",
        "setup.cfg",
        "pyproject.toml",
        "sret_scale/cli.py",
        "sret_scale/__init__.py",
    ):
        shutil.copy(ROOT / name, folder / name)
    return folder / "launch.sh"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return folder


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_help_lists_everything_at_once_from_anywhere(tmp_path: Path) -> None:
    began = time.monotonic()
    result = run(ROOT / "launch.sh", "--help", cwd=tmp_path)
    assert result.returncode == 0
    for word in ("launch.sh test", "setup", "--no-venv", "train", "describe"):
        assert word in result.stdout
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize("name", ["trian", "$(touch x)", "--fast", "-x", "describe.*"])
def test_wrong_command_is_named_before_anything_is_installed(copy: Path, name: str) -> None:
    result = run(copy, name, cwd=copy.parent)
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown") and name in result.stderr
    assert not (copy.parent / ".venv").exists() and not (copy.parent / "x").exists()


def test_no_python_says_what_to_install(copy: Path, tools: Path) -> None:
    result = run(copy, "setup", cwd=copy.parent, path=str(tools))
    assert result.returncode == 2
    assert "no usable Python 3.11 or 3.12" in result.stderr and "--no-venv" in result.stderr


def test_shim_that_does_not_start_is_passed_over(copy: Path, tools: Path) -> None:
    program(tools / "python3.11", "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n")
    program(tools / "python3.12", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    result = run(copy, "--help", cwd=copy.parent, path=str(tools))
    assert result.returncode == 0 and "describe" in result.stdout


def test_failed_step_shows_the_log_and_what_to_do(copy: Path, tools: Path) -> None:
    program(
        tools / "python3.11",
        '#!/bin/sh\ncase "$1" in -m) echo "the disk is full" >&2; exit 1;; esac\nexit 0\n',
    )
    result = run(copy, "setup", cwd=copy.parent, path=str(tools))
    assert result.returncode == 2
    assert "the disk is full" in result.stderr
    assert "run the same command again" in result.stderr.splitlines()[-1]


def test_no_venv_names_what_the_environment_lacks(copy: Path, tools: Path) -> None:
    program(tools / "python", f'#!/bin/sh\nexec "{sys.executable}" -S -I "$@"\n')
    result = run(copy, "--no-venv", "describe", "sret_t", cwd=copy.parent, path=str(tools))
    assert result.returncode == 2
    assert "lacks torch, deepspeed" in result.stderr
    assert not (copy.parent / ".venv").exists()


def test_no_venv_runs_a_command_where_the_user_stands(tmp_path: Path) -> None:
    folder = tmp_path / "some where"
    folder.mkdir()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = run(ROOT / "launch.sh", "--no-venv", "train", "--help", cwd=folder, path=path)
    assert result.returncode == 0, result.stderr
    assert "--hostfile" in result.stdout
    assert list(folder.iterdir()) == []
