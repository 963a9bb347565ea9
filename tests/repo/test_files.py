"""Files that are whole or not there: on the disk before they have their name, and under no other name afterwards."""

import ast
import os
from pathlib import Path

import pytest

from data_pipelines.atomic_files import replacing, write_whole
from tests.tiny import ROOT


def test_a_file_is_flushed_before_it_has_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    rename, fsync = Path.replace, os.fsync

    def replace(source: Path, target: Path) -> Path:
        happened.append(f"rename to {target.name}")
        return rename(source, target)

    def flush(descriptor: int) -> None:
        happened.append(f"flush {Path(f'/proc/self/fd/{descriptor}').readlink().name.partition('.')[0]}")
        fsync(descriptor)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(os, "fsync", flush)
    write_whole(tmp_path / "status.json", "new")
    assert happened == ["flush status", "rename to status.json", f"flush {tmp_path.name}"]
    happened.clear()
    write_whole(tmp_path / "status.json", b"newer", is_durable=False)
    assert happened == ["rename to status.json"]
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("status.json", "newer")]


def test_what_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "old")
    with pytest.raises(KeyError), replacing(tmp_path / "a") as file:
        file.write(b"half")
        raise KeyError
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a", "old")]
    with pytest.raises(FileNotFoundError) as info:
        write_whole(tmp_path / "no" / "a", "text")
    assert info.value.filename == str(tmp_path / "no" / "a")


def test_files_are_renamed_into_place_in_one_module_only() -> None:
    """Folders and downloads have steps of their own between the flush and the name."""
    found = set()
    for file in (*(ROOT / "sret_scale").rglob("*.py"), *(ROOT / "data_pipelines").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if len(node.args) == 1 and not node.keywords and node.func.attr in ("replace", "rename"):
                found.add(str(file.relative_to(ROOT)))
    assert "data_pipelines/atomic_files.py" in found
    assert found <= {
        "data_pipelines/atomic_files.py",
        # Downloads, which are checked before they have their name.
        *("data_pipelines/remote/shard_sets.py", "data_pipelines/remote/cache.py", "data_pipelines/remote/fetch.py"),
        # Folders.
        "sret_scale/runs/checkpoint.py",
        "data_pipelines/writing/write.py",
        # The compiled library, which is built again where it is missing.
        "data_pipelines/image/native/library.py",
    }
