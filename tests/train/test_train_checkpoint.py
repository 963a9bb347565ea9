"""Checkpoints: complete or invisible, and every damage found."""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines import atomic_files
from sret_scale.runs import checkpoint
from sret_scale.runs.checkpoint import (
    CheckpointError,
    list_checkpoints,
    newest_valid,
    prune_checkpoints,
    read_state,
    read_tensors,
    save_checkpoint,
    verify_checkpoint,
)

TENSORS = {"weights": {"a": torch.arange(12.0).view(3, 4), "count": torch.tensor(3)}, "optimizer": {}}


def silent(_text: str) -> None:
    raise AssertionError("nothing is wrong")


def test_what_is_read_is_what_was_saved(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, step=7, tensors=TENSORS, state={"images": 70})
    verify_checkpoint(path)
    assert read_state(path) == {"format": 1, "step": 7, "images": 70}
    assert torch.equal(read_tensors(path, "weights")["a"], TENSORS["weights"]["a"])
    assert read_tensors(path, "optimizer") == {} == read_tensors(path, "ema")
    assert newest_valid(tmp_path, silent) == path


def test_the_newest_come_first_and_the_oldest_go(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        save_checkpoint(tmp_path, step=step, tensors=TENSORS, state={})
    (tmp_path / ".writing-step-000000200").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000000100", "step-000000020", "step-000000005"]
    prune_checkpoints(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000000100", "step-000000020"]
    save_checkpoint(tmp_path, step=100, tensors=TENSORS, state={"again": True})
    assert read_state(tmp_path / "step-000000100")["again"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("code", [errno.ENOTEMPTY, errno.EBUSY])
def test_what_cannot_be_deleted_stops_no_save_and_goes_with_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(path: object, *_arguments: object, **_options: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    leftover = tmp_path / ".writing-step-000000002"
    leftover.mkdir()
    (leftover / "weights.safetensors").write_bytes(b"half")
    with monkeypatch.context() as nfs:
        nfs.setattr(os, "rmdir", refuse)
        for step in (1, 2, 2, 3):
            save_checkpoint(tmp_path, step=step, tensors=TENSORS, state={})
            prune_checkpoints(tmp_path, 1)
        assert leftover.exists()
        assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000000003"]
    with monkeypatch.context() as nfs:
        nfs.setattr(Path, "rename", refuse)
        prune_checkpoints(tmp_path, 0)
    newest = save_checkpoint(tmp_path, step=4, tensors=TENSORS, state={})
    prune_checkpoints(tmp_path, 1)
    assert list(tmp_path.iterdir()) == [newest]
    verify_checkpoint(newest)


def test_every_file_is_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    rename, flush = Path.rename, atomic_files.sync_path

    def seen_rename(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    def seen_flush(path: Path) -> None:
        events.append(path.name.partition("-")[0])
        flush(path)

    monkeypatch.setattr(Path, "rename", seen_rename)
    monkeypatch.setattr(checkpoint, "sync_path", seen_flush)
    save_checkpoint(tmp_path / "checkpoints", step=1, tensors=TENSORS, state={})
    files = {"manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors"}
    assert set(events[:4]) == files and events[4:] == [".writing", "rename", "checkpoints"]


def test_a_refused_rename_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, target: Path) -> Path:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="cannot save checkpoint"):
        save_checkpoint(tmp_path, step=1, tensors=TENSORS, state={})
    assert list(tmp_path.iterdir()) == []


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 1 << (place % 8)
    file.write_bytes(content)


def cut(file: Path, place: int) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: place % len(content)])


def remove(file: Path, _place: int) -> None:
    file.unlink()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([flip, cut, remove]), st.integers(0, 10**6), st.integers(0, 10))
def test_every_damage_is_found_and_the_one_before_is_used(
    tmp_path: Path, damage: Callable[[Path, int], None], place: int, which: int
) -> None:
    good = save_checkpoint(tmp_path, step=1, tensors=TENSORS, state={"images": 1})
    bad = save_checkpoint(tmp_path, step=2, tensors=TENSORS, state={"images": 2})
    files = sorted(bad.iterdir())
    damage(files[which % len(files)], place)
    said: list[str] = []
    assert newest_valid(tmp_path, said.append) == good
    assert len(said) == 1 and str(bad) in said[0]


def test_starting_over_must_be_said_in_words(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, step=1, tensors=TENSORS, state={})
    flip(path / "weights.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints .* --fresh"):
        newest_valid(tmp_path, lambda _text: None)
    assert newest_valid(tmp_path / "nothing", silent) is None


def test_a_manifest_of_another_format_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, step=1, tensors=TENSORS, state={})
    (path / "manifest.json").write_text(json.dumps({"format": 2, "files": {}}))
    with pytest.raises(CheckpointError, match="format: expected 1, got 2"):
        verify_checkpoint(path)


SAVE_BIG = """
import resource, sys, torch
from pathlib import Path
from sret_scale.runs.checkpoint import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(Path(sys.argv[1]), step=2, tensors={"weights": {"a": torch.zeros(100_000)}}, state={})
except OSError as error:
    sys.exit(f"{error}")
"""


@pytest.mark.multi_process
def test_a_refusing_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    good = save_checkpoint(tmp_path, step=1, tensors=TENSORS, state={})
    run = subprocess.run([sys.executable, "-c", SAVE_BIG, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "step-000000002 (400,000 bytes of tensors): " in run.stderr and "intact" in run.stderr
    assert list(tmp_path.iterdir()) == [good]
    verify_checkpoint(good)
