"""Reads run folders as `train` writes them, and says what in them cannot be trusted.

A folder that lacks what every run has is an error: it is no run, or another version's. What a kill or a divergence does
to a run's metrics is tolerated and becomes a remark (see `metrics`).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict
from typing_extensions import TypedDict

from data_pipelines.checked_files import read_checked
from data_pipelines.text.tokens import tokens_sha256
from sret_scale.config.run_config import read_yaml
from sret_scale.runs.metrics_log import Line, Series, is_count, not_finite, number, read_metrics
from sret_scale.runs.run_folder import RunFolder

# The parts that runs play in an experiment, in the order in which they are read.
ROLES = ("teacher", "student", "control")
# What the report needs of `describe()`; a folder without them was written by a version that counted differently.
MODEL_COUNTS = ("applications", "residual_sublayers", "weight_layers", "parameters", "macs")


class Environment(TypedDict, total=False):
    """What the page shows of environment.json; other keys stay."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    versions: dict[str, str]
    command: str
    commit: str | None
    cpu: str | None
    gpu: str | None
    num_cpus: int | None
    world_size: int
    nodes: list[dict[str, Any]]


class Status(TypedDict, total=False):
    """How the run ended."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    state: str
    exit_code: int | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run folder in memory. `lines` are the valid metric lines in order; `remarks` are sentences for the reader."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    model: Mapping[str, Any]
    environment: Mapping[str, Any]
    status: Mapping[str, Any]
    lines: tuple[Line, ...]
    remarks: tuple[str, ...]

    def of_kind(self, kind: str, **where: object) -> list[Line]:
        """The lines of one kind whose fields have the values asked for."""
        return [line for line in self.lines if line["kind"] == kind and all(line.get(k) == v for k, v in where.items())]

    def series(self, kind: str, field: str, **where: object) -> Series:
        """`field` over samples seen, from the lines that have it."""
        lines = [line for line in self.of_kind(kind, **where) if field in line]
        return Series(
            images=np.array([line["images"] for line in lines], dtype=np.float64),
            values=np.array([number(line[field]) for line in lines], dtype=np.float64),
        )

    def last(self, kind: str, field: str, **where: object) -> float | None:
        """The last value of `field`, NaN included; None if no line has it."""
        values = self.series(kind, field, **where).values
        return float(values[-1]) if len(values) else None

    def largest(self, kind: str, field: str) -> float | None:
        """The largest value of `field`; None if no line has a number there (null is how a CPU run says 'no device')."""
        values = self.series(kind, field).values
        return float(np.nanmax(values)) if np.isfinite(values).any() else None

    @property
    def accuracy(self) -> tuple[str, str]:
        """(field, words) of the number that an evaluation of the run's task is best in."""
        known = {"grid": ("exact", "exact match"), "language": (saved := ("saved", "bits saved")), "translation": saved}
        return known.get(self.config.get("task", ""), ("top1", "top-1"))

    @property
    def images_seen(self) -> int:
        return max((int(line["images"]) for line in self.lines), default=0)

    @property
    def time_s(self) -> float:
        return max((float(line["time_s"]) for line in self.lines), default=0.0)


def measure_of(run: RunRecord) -> tuple[str, str | None]:
    """What accuracies and losses are of: those of runs of another task or other tokens have another meaning."""
    tokens = RunFolder(run.folder).tokens
    return str(run.config.get("task", "classification")), tokens_sha256(tokens if tokens.is_file() else None)


def load_runs(paths: Iterable[Path]) -> tuple[list[RunRecord], list[str]]:
    """The runs that the paths name, in order, and sentences on what was left out.

    A path is a run folder, or a folder of run folders: an unreadable one is left out with its reason, so that one
    killed run of a sweep does not cost the page. Raises FileNotFoundError or ValueError for a path that is neither.
    """
    runs: dict[Path, RunRecord] = {}
    left_out: list[str] = []
    for path in paths:
        for folder in [path] if is_run_folder(path) else _run_folders_in(path):
            try:
                runs.setdefault(folder.resolve(), load_run(folder))
            except (ValueError, OSError) as error:
                left_out.append(str(error))
    if not runs:
        raise ValueError("no run to report on: " + ("; ".join(left_out) or "pass at least one run folder"))
    return _with_distinct_names(list(runs.values())), left_out


def is_run_folder(path: Path) -> bool:
    """Whether `train` began to write a run here."""
    return (path / "config.yaml").is_file() or (path / "metrics.jsonl").is_file()


def load_run(folder: Path) -> RunRecord:
    """One run. Raises FileNotFoundError or ValueError, naming file and remedy, if it is not a run of this version."""
    if not is_run_folder(folder):
        raise FileNotFoundError(f"{folder} is not a run folder: it has neither config.yaml nor metrics.jsonl")
    environment = _read(folder / "environment.json", Environment)
    model = _read(folder / "model.json", dict[str, Any])
    absent = [key for key in MODEL_COUNTS if not is_count(model.get(key))]
    if absent:
        version = environment.get("versions", {}).get("sret-scale", "a version that did not say")
        raise ValueError(
            f"{folder}/model.json has no number for {', '.join(absent)}: the folder was written by sret_scale "
            f"{version}. Report on it with that version, or train again"
        )
    status_file, file = folder / "status.json", folder / "config.yaml"
    lines, remarks = read_metrics(folder / "metrics.jsonl")
    try:
        status = _read(status_file, Status) if status_file.is_file() else {}
    except ValueError as error:
        # It tells how the run ended, and no number.
        status, remarks = {}, [*remarks, f"Left out: {error}."]
    config = _sections(_or_absent(lambda: read_yaml(file), file), file)
    return RunRecord(
        name=folder.resolve().name,
        folder=folder,
        config=config,
        model=model,
        environment=environment,
        status=status,
        lines=tuple(lines),
        remarks=tuple(remarks + not_finite(lines)),
    )


def _run_folders_in(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(
            f"no run folder {path}: it does not exist (training writes one folder per run, by default under runs/)"
        )
    if not path.is_dir():
        raise ValueError(f"{path} is a file, not a run folder: name the folder that has config.yaml and metrics.jsonl")
    folders = sorted((child for child in path.iterdir() if child.is_dir() and is_run_folder(child)), key=_reading_order)
    if not folders:
        raise FileNotFoundError(
            f"{path} is not a run folder and has none in it: expected config.yaml and metrics.jsonl"
        )
    return folders


def _reading_order(folder: Path) -> tuple[int, list[tuple[int, str]]]:
    """Teacher, student, control, the rest; and `depth-20` before `depth-100`."""
    rank = next((index for index, word in enumerate(ROLES) if word in folder.name.lower()), len(ROLES))
    pieces = re.split(r"(\d+)", folder.name)
    return rank, [(int(piece), "") if piece.isdecimal() else (0, piece) for piece in pieces]


def _with_distinct_names(runs: list[RunRecord]) -> list[RunRecord]:
    """The runs, those of equal folder name told apart by the shortest ends of their paths that differ."""
    ends = [_path_ends(run.folder) for run in runs]
    uses = Counter(end for own in ends for end in own)
    return [
        RunRecord(**{**vars(run), "name": next((end for end in own if uses[end] == 1), own[-1])})
        for run, own in zip(runs, ends, strict=True)
    ]


def _path_ends(folder: Path) -> list[str]:
    """The last part of a path, the last two, and so on to all."""
    parts = folder.resolve().parts[1:]
    return ["/".join(parts[-length:]) for length in range(1, len(parts) + 1)]


def _read(path: Path, schema: type[Any]) -> dict[str, Any]:
    return dict(_or_absent(lambda: read_checked(path, schema), path))


def _or_absent(read: Callable[[], Any], path: Path) -> Any:
    """What `read` gives; for a file that is not there, an error that says what that means."""
    try:
        return read()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}: the run failed before its first step, or another version wrote it"
        ) from None


def _sections(tree: object, path: Path) -> dict[str, Any]:
    """The configuration, of whichever version; the sections that the report reads have names in them."""
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}, expected a mapping: another version wrote it")
    for name in ("train", "distill", "model", "memory", "optim", "data"):
        if not isinstance(tree.get(name, {}), dict):
            raise ValueError(f"{path}: expected a section {name} of `key: value`, got {ascii(tree[name])[:60]}")
    return tree
