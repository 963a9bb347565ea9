"""The command in a message about a missing package works in the environment at hand."""

import importlib.metadata
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines import extras

ROOT = Path(__file__).parents[2]
PIP = f"{sys.executable} -m pip install"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The project is installed in an environment that is not the checkout's own."""
    monkeypatch.setattr(sys, "prefix", "/opt/conda")
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: None)


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout that is used where it lies, by an environment of the user's."""

    def distribution(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(sys, "prefix", "/opt/conda")
    monkeypatch.setattr("importlib.metadata.distribution", distribution)


def test_own_environment_is_extended_by_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(ROOT / ".venv"))
    assert extras.install_extra("wandb") == f"{ROOT}/launch.sh setup wandb"
    assert extras.install_packages("gcsfs") == f"{PIP} -c {ROOT}/constraints.txt gcsfs"


def test_installed_project_is_asked_for_its_extra(installed: None) -> None:
    assert extras.install_extra("wandb") == f"{PIP} 'sret-scale[wandb]'"
    assert extras.install_packages("torch>=2.11") == f"{PIP} 'torch>=2.11'"


def test_checkout_that_is_not_installed_names_the_packages(not_installed: None) -> None:
    assert extras.install_extra("remote") == f"{PIP} aiohttp fsspec s3fs stamina"


@pytest.mark.multi_process
def test_pip_takes_the_command(not_installed: None) -> None:
    command = shlex.split(extras.install_extra("timm"))
    ended = subprocess.run(
        [*command, "--no-index", "--dry-run"], capture_output=True, text=True, check=False, timeout=100
    )
    assert ended.returncode == 0, ended.stderr


def test_no_message_has_a_command_of_its_own() -> None:
    """And each names an extra that exists, which mypy cannot know."""
    text = {path: path.read_text() for room in ("sret_scale", "data_pipelines") for path in (ROOT / room).rglob("*.py")}
    assert [path for path, code in text.items() if "pip install" in code.replace(extras.__file__, "")] == []
    named = {name for code in text.values() for name in re.findall(r"install_extra\([\"\'](\w+)", code)}
    assert named == {"export", "parquet", "remote", "teachers", "text", "timm"}
