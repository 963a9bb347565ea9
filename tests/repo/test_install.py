"""What pip makes of the project: a wheel that is whole and works away from the checkout, and an editable install."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from pathlib import Path

import pytest

from sret_scale import __version__

ROOT = Path(__file__).parents[2]
PACKAGES = ("sret_scale", "data_pipelines", "ds_configs")
PIP = ("-m", "pip", "--no-input", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, as a clone has them."""
    folder = tmp_path_factory.mktemp("install") / "project"
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "_roi_decode.*")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "tests").mkdir()
    (folder / "tests" / "__init__.py").touch()
    return folder


@pytest.fixture(scope="module")
def wheel(project: Path) -> Path:
    folder = project.parent / "wheel"
    command = [sys.executable, *PIP, "wheel", "--no-build-isolation", "--no-deps", "-w", str(folder), str(project)]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = folder.iterdir()
    return file


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of a new environment that sees the packages of this one, but not the project."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    # Of a folder that a .pth file names, no .pth file is read: this environment's own editable install stays out.
    Path(site.strip(), "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def environment(**changes: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | changes


@pytest.mark.multi_process
def test_wheel_holds_every_file_of_the_packages_and_no_other(project: Path, wheel: Path) -> None:
    expected = {str(file.relative_to(project)) for name in PACKAGES for file in (project / name).rglob("*.*")}
    expected |= {str(file.relative_to(project)) for file in (project / "data_pipelines").rglob("LICENSE")}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == {name for name in expected if (project / name).is_file()}
    suffixes = {Path(name).suffix for name in found}
    assert {".c", ".h", ".html", ".json", ".gz", ".txt", ".typed"} <= suffixes
    assert wheel.name.startswith(f"sret_scale-{__version__}-")


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("compiler", ["cc", "no-such-compiler"])
def test_wheel_runs_the_demo_away_from_the_checkout(wheel: Path, python: Path, tmp_path: Path, compiler: str) -> None:
    subprocess.run([python, *PIP, "install", "--no-index", "--no-deps", wheel], check=True, capture_output=True)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    variables = environment(XDG_CACHE_HOME=str(tmp_path / "cache"), CC=compiler)
    command = str(python.with_name("sret-scale"))
    assert (
        subprocess.check_output([command, "--version"], text=True, cwd=folder, env=variables)
        == f"sret-scale {__version__}\n"
    )
    with (tmp_path / "output").open("w") as stream, subprocess.Popen(
        [command, "demo"], cwd=folder, env=variables, stdout=stream, stderr=subprocess.STDOUT
    ) as demo:  # fmt: skip
        metrics = folder / "runs" / "demo" / "teacher" / "metrics.jsonl"
        while demo.poll() is None and not (metrics.exists() and '"train"' in metrics.read_text()):
            time.sleep(0.5)
        demo.send_signal(signal.SIGTERM)
    output = (tmp_path / "output").read_text()
    assert demo.returncode == 85, output
    libraries = list((tmp_path / "cache" / "sret_scale").glob("_roi_decode.*.so"))
    said = output.count("not built, so whole images will be decoded: no C compiler 'no-such-compiler'; set CC")
    assert (len(libraries), said) == ((1, 0) if compiler == "cc" else (0, 1)), output
    where = [str(python), "-c", "import sret_scale; print(sret_scale.__file__)"]
    file = Path(subprocess.check_output(where, text=True, cwd=folder, env=variables).strip())
    assert file.is_relative_to(python.parents[1])


@pytest.mark.slow
def test_types_of_an_editable_install_are_seen_from_another_folder(project: Path, python: Path, tmp_path: Path) -> None:
    command = [*PIP, "install", "--no-index", "--no-deps", "--no-build-isolation", "-e", str(project)]
    subprocess.run([python, *command], check=True, capture_output=True)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "user.py").write_text(
        "from data_pipelines.config import DataConfig\n"
        "from sret_scale.model import preset\n\n"
        "reveal_type(preset('sret_t').num_classes)\n"
        "reveal_type(DataConfig().order)\n"
        "preset(3)\n"
    )
    check = [sys.executable, "-P", "-m", "mypy", "--strict", "--python-executable", str(python), "user.py"]
    result = subprocess.run(check, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    assert lines[0].endswith('note: Revealed type is "int"') and "full" in lines[1], result.stdout
    assert 'error: Argument 1 to "preset" has incompatible type "int"; expected "str"' in lines[2]
    assert len(lines) == 4, result.stdout
