"""Checkpoints that are complete or invisible, hold whole fp32 state, and load at any world size and ZeRO stage.

    checkpoints/step-000000123/
        weights.safetensors     parameters and buffers, by the model's names
        ema.safetensors         the moving average, where one is kept
        ema_statistics.safetensors  BatchNorm's statistics measured for it, where it was evaluated at this step
        optimizer.safetensors   exp_avg.NAME, exp_avg_sq.NAME, step
        state.json              clock, data position, model config, versions
        manifest.json           size and SHA-256 of each file above; written last

A checkpoint is written into a folder with a temporary name, flushed to the disk, and renamed.
Nothing in it can run code. What a clean-up cannot delete is left to the next save: it takes room, and hides nothing.
"""

import contextlib
import errno
import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Required

from pydantic import ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import TypedDict

from data_pipelines.atomic_files import sync_path
from data_pipelines.checked_files import read_checked
from sret_scale.runs.rank_errors import in_words

FORMAT = 1
_NAME = re.compile(r"step-(\d{9})")
_TEMPORARY = ".writing-"


class _Entry(TypedDict):
    bytes: int
    sha256: str


class _Manifest(TypedDict):
    format: Literal[1]
    files: dict[str, _Entry]


_Count = Annotated[int, Field(ge=0, lt=2**63)]


class _State(TypedDict, total=False):
    """What is used of state.json, where it is there; other keys stay."""

    __pydantic_config__ = ConfigDict(extra="allow", allow_inf_nan=False)  # type: ignore[misc]
    format: Required[Literal[1]]
    step: _Count
    images: _Count
    time_s: float
    loader: str
    skipped_steps: _Count
    loss_scale: dict[str, Any] | None
    missed_updates: dict[str, _Count]
    ema_updates: _Count
    is_evaluated: bool
    model: dict[str, Any]


class CheckpointError(ValueError):
    """A checkpoint that is not what it should be; the message names the file, what was expected and what was found."""


class _KnownState(dict[str, Any]):
    """A state that says which file lacks what is asked for."""

    def __init__(self, file: Path) -> None:
        super().__init__(_read_checked(file, _State))
        self._file = file

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"{self._file}: {key} is missing")


def save_checkpoint(
    folder: Path, *, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write `folder/step-NNNNNNNNN` from named sets of tensors and a JSON state; returns its path.

    One process calls it. Raises OSError, saying path and bytes, where the disk refuses; what was saved before stays.
    """
    final = folder / f"step-{step:09d}"
    temporary = _temporary_name(final)
    num_bytes = sum(value.nbytes for values in tensors.values() for value in values.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary.mkdir()
        for name, values in tensors.items():
            cpu = {key: value.detach().cpu().contiguous() for key, value in values.items()}
            save_file(cpu, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps({"format": FORMAT, "step": step, **state}, indent=1))
        files = {file.name: _entry(file) for file in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
        for path in (*temporary.iterdir(), temporary):
            sync_path(path)
        if final.exists():
            # A run that went back to an older checkpoint comes to this step again.
            final.rename(_temporary_name(final))
        temporary.rename(final)
        sync_path(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"cannot save checkpoint {final} ({num_bytes:,} bytes of tensors): {in_words(error)}; earlier checkpoints "
            "are intact: remove the cause and run the same command again",
        ) from error
    _remove_leftovers(folder)
    return final


def _temporary_name(path: Path) -> Path:
    # Never one that was used before: a leftover that could not be deleted must not be in the way of the next save.
    return path.with_name(f"{_TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")


def _remove_leftovers(folder: Path) -> None:
    """Delete what interrupted saves left, as far as the disk allows it now; the next save tries again.

    NFS refuses to empty a folder (ENOTEMPTY, EBUSY) while a reader still holds a file of it open.
    """
    with contextlib.suppress(OSError):
        for leftover in folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints of a run, newest first."""
    if not folder.is_dir():
        return []
    return sorted((entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name)), reverse=True)


def verify_checkpoint(path: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there, whole and unchanged."""
    for name, expected in _read_checked(path / "manifest.json", _Manifest)["files"].items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{path / ascii(name)[1:-1]}: missing, or no plain name")
        found = _entry(file)
        for what, value in found.items():
            if value != expected[what]:
                raise CheckpointError(f"{file}: expected {what} {expected[what]}, found {value}")


def newest_valid(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; each bad one is reported and passed over. None where there is none at all.

    Raises CheckpointError where there are checkpoints and every one is bad: starting over must be said in words.
    """
    checkpoints = list_checkpoints(folder)
    for path in checkpoints:
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            report(f"checkpoint passed over: {error}")
        else:
            return path
    if checkpoints:
        raise CheckpointError(
            f"none of the {len(checkpoints)} checkpoints in {folder} is intact (see above); "
            "restore one, or start over with --fresh"
        )
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint."""
    return _KnownState(path / "state.json")


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """One named set of tensors of a checkpoint, on the CPU; empty where the checkpoint has no such set."""
    file = path / f"{name}.safetensors"
    if not file.exists():
        return {}
    try:
        return load_file(file)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, as far as the disk allows it now; the next call tries again."""
    with contextlib.suppress(OSError):
        for path in list_checkpoints(folder)[keep:]:
            # Renamed first: a half-deleted checkpoint must not look committed.
            path.rename(_temporary_name(path))
    _remove_leftovers(folder)


def _read_checked(file: Path, schema: type[Any]) -> Any:
    try:
        return read_checked(file, schema)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing") from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error
