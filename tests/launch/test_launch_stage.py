"""A copy of the environment on the node's own disk: what is in it, who may write it, and that ranks import from it."""

import os
import subprocess
import sys
import tarfile
import threading
from importlib import metadata
from pathlib import Path

import pytest

from sret_scale.launch import staging as stage
from sret_scale.launch.packages import required
from sret_scale.launch.staging import LARGEST_COPIED_BYTES, LOCAL, fingerprint, pack, staged_environment, unpack
from tests.tiny import ROOT


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """(prefix, project, site-packages) of a small environment on the shared folder."""
    shared = tmp_path / "shared"
    site = shared / "env" / "site-packages"
    files = {
        site / "torch/__init__.py": "from torch import part",
        site / "torch/part.py": "VALUE = 7",
        site / "torch/include/header.h": "int x;",
        site / "pillow.libs/libtiff.so": "library",
        site / "unused/__init__.py": "",
        site / "torch-2.0.dist-info/METADATA": "",
        shared / "project/sret_scale/__init__.py": "",
        shared / "project/data_pipelines/sample/image": "pixels",
        shared / "project/ds_configs/zero1.json": "{}",
        shared / "project/runs/of_the_user": "not packed",
    }
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (site / "torch/lib.so").write_bytes(bytes(LARGEST_COPIED_BYTES + 1))
    # The real one starts Python and imports what a rank imports.
    monkeypatch.setattr(stage, "_packages", lambda project: {"torch"})
    return shared / "env", shared / "project", site


def test_copy_has_the_small_files_and_links_to_the_large_ones(
    installed: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    prefix, project, site = installed
    folder = unpack(pack(prefix, project, [site]), tmp_path / "local")
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir() or file.is_symlink()}
    expected = {
        "torch-2.0.dist-info/METADATA",
        "torch/__init__.py",
        "torch/part.py",
        "torch/lib.so",
        "torch/include",
        "pillow.libs/libtiff.so",
    }
    expected |= {"sret_scale/__init__.py", "data_pipelines/sample/image", "ds_configs/zero1.json"}
    assert found == expected
    assert {name for name in expected if (folder / name).is_symlink()} == {"torch/lib.so", "torch/include"}
    assert (folder / "torch/lib.so").resolve() == (site / "torch/lib.so").resolve()
    # A compiled file is valid as long as its source has the time that is written in it.
    assert int((folder / "torch/part.py").stat().st_mtime) == int((site / "torch/part.py").stat().st_mtime)
    environment = staged_environment(folder, {"PATH": "/bin", "PYTHONPATH": str(project)}, str(tmp_path))
    code = "import sys, torch, sret_scale; print(torch.part.VALUE, torch.__file__, sret_scale.__file__, sys.path[-1])"
    process = subprocess.run([sys.executable, "-S", "-c", code], env=environment, capture_output=True, text=True)
    value, *files, _ = process.stdout.split()
    assert value == "7" and all(file.startswith(str(folder)) for file in files), process.stderr


def test_packages_are_those_that_are_imported_and_what_they_require(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {
        "torch": ["SymPy>=1.13", 'triton; extra == "gpu"', "typing-extensions"],
        "sympy": ["mpmath<1.4"],
        "mpmath": None,
    }

    def requires(name: str) -> list[str] | None:
        if name not in needs:
            raise metadata.PackageNotFoundError(name)
        return needs[name]

    monkeypatch.setattr(metadata, "requires", requires)
    assert required({"torch"}) == {"torch", "sympy", "mpmath", "typing_extensions"}


def test_archive_is_made_again_only_for_another_environment(installed: tuple[Path, Path, Path]) -> None:
    prefix, project, site = installed
    first = pack(prefix, project, [site])
    inode = first.stat().st_ino
    os.utime(first, (0, 0))
    assert pack(prefix, project, [site]) == first and first.stat().st_ino == inode
    # In use again, so that no other job removes it as an old one.
    assert first.stat().st_mtime > 0
    prints = {fingerprint(project, [site])}
    (site / "torch-2.0.dist-info").rename(site / "torch-2.1.dist-info")
    prints.add(fingerprint(project, [site]))
    (project / "sret_scale/__init__.py").write_text("changed = True")
    prints.add(fingerprint(project, [site]))
    (site / "torch-2.1.dist-info/RECORD").write_text("the same version, installed again")
    prints.add(fingerprint(project, [site]))
    assert len(prints) == 4
    # Python writes these while it imports.
    (project / "sret_scale/__pycache__").mkdir()
    (project / "sret_scale/__pycache__/part.cpython-311.pyc").write_text("compiled")
    assert fingerprint(project, [site]) in prints
    # They are large: an old one goes, unless a job may just be starting from it.
    second = pack(prefix, project, [site])
    assert set(prefix.glob("*.tar")) == {first, second}
    os.utime(first, (0, 0))
    (site / "torch-2.1.dist-info").rename(site / "torch-2.2.dist-info")
    third = pack(prefix, project, [site])
    assert set(prefix.glob("*.tar")) == {second, third}


def test_ranks_of_many_jobs_on_a_node_unpack_once(
    installed: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, project, site = installed
    archive = pack(prefix, project, [site])
    opened: list[object] = []
    original = tarfile.open

    def counting(*args: object, **kwargs: object) -> object:
        opened.append(args)
        return original(*args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(tarfile, "open", counting)
    threads = [threading.Thread(target=unpack, args=(archive, tmp_path / "local")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(opened) == 1


def test_folder_of_somebody_else_is_refused(installed: tuple[Path, Path, Path], tmp_path: Path) -> None:
    prefix, project, site = installed
    archive = pack(prefix, project, [site])
    own = tmp_path / "local" / f"sret-{os.geteuid()}"
    own.mkdir(parents=True)
    own.chmod(0o777)
    with pytest.raises(PermissionError, match="can be written by others"):
        unpack(archive, tmp_path / "local")
    own.rmdir()
    (tmp_path / "elsewhere").mkdir()
    own.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="belongs to another user"):
        unpack(archive, tmp_path / "local")


def test_member_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "sret-scale-evil.tar"
    with tarfile.open(archive, "w") as tar:
        tar.addfile(tarfile.TarInfo("../evil"))
    with pytest.raises(OSError, match=r"is damaged .*outside"):
        unpack(archive, tmp_path / "local")
    assert not (tmp_path / "local" / "evil").exists()


def test_prefix_that_cannot_be_written_says_what_to_do(installed: tuple[Path, Path, Path]) -> None:
    prefix, project, site = installed
    with pytest.raises(OSError, match=f"{LOCAL}: .* cannot be written: .*; unset {LOCAL}"):
        pack(prefix / "missing", project, [site])


def test_broken_environment_is_named_and_leaves_nothing(
    tmp_path: Path, installed: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, project, site = installed
    monkeypatch.undo()
    (project / "sret_scale/launch").mkdir(parents=True)
    (project / "sret_scale/launch/packages.py").write_text("import absent_module")
    with pytest.raises(OSError, match=r"cannot be listed: .*absent_module.*; fix that or unset"):
        pack(prefix, project, [site])
    assert not list(prefix.glob("sret-scale-*"))


@pytest.mark.slow
@pytest.mark.multi_process
def test_ranks_import_from_the_copy_and_a_refused_copy_is_named(tmp_path: Path) -> None:
    """The real environment: 440 MB are packed once (15 s), beside the installed packages."""
    code = (
        "import sys; from pathlib import Path; from sret_scale.launch.launcher import launch; run = Path(sys.argv[1]);"
        "sys.exit(launch(run, run / 'config.yaml', num_ranks=2, module='tests.ranks.staged_rank'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), LOCAL: str(tmp_path / "local")}
    for name in ("good", "refused"):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text("")
        process = subprocess.run(
            [sys.executable, "-c", code, str(run)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        own = tmp_path / "local" / f"sret-{os.geteuid()}"
        if name == "good":
            assert process.returncode == 0, process.stderr
            for rank in range(2):
                places = (run / f"imported-{rank}").read_text().split()
                assert len(places) == 3 and all(place.startswith(str(own)) for place in places)
            own.chmod(0o777)
        else:
            assert process.returncode == 2
            assert "can be written by others; remove it" in process.stderr.splitlines()[-1]
            assert process.stderr.splitlines()[-1].startswith("error: host ")
