"""Reads run folders as `train` writes them, and says what in them cannot be trusted.

A folder that lacks what every run has is an error: it is no run, or another version's. What a kill or a divergence does
to a run's metrics is tolerated and becomes a remark (see `metrics`).
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sret_scale.runs.metrics_log import Line, Series, is_count, not_finite, number, read_metrics

# The parts that runs play in an experiment, in the order in which they are read.
ROLES = ("teacher", "student", "control")
# What the report needs of `describe()`; a folder without them was written by a version that counted differently.
MODEL_COUNTS = ("applications", "residual_sublayers", "weight_layers", "parameters", "macs")


@dataclass(frozen=True, kw_only=True)
class Run:
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
        """`field` over images seen, from the lines that have it."""
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
    def images_seen(self) -> int:
        return max((int(line["images"]) for line in self.lines), default=0)

    @property
    def time_s(self) -> float:
        return max((float(line["time_s"]) for line in self.lines), default=0.0)


def load_runs(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs that the paths name, in order, and sentences on what was left out.

    A path is a run folder, or a folder of run folders: there an unreadable one is left out with its reason, so that one
    killed run of a sweep does not cost the page. Raises FileNotFoundError or ValueError for a path that is neither.
    """
    runs: dict[Path, Run] = {}
    left_out: list[str] = []
    for path in paths:
        if is_run_folder(path):
            runs.setdefault(path.resolve(), load_run(path))
            continue
        for folder in _run_folders_in(path):
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


def load_run(folder: Path) -> Run:
    """One run. Raises FileNotFoundError or ValueError, naming file and remedy, if it is not a run of this version."""
    if not is_run_folder(folder):
        raise FileNotFoundError(f"{folder} is not a run folder: it has neither config.yaml nor metrics.jsonl")
    environment = _read_json(folder / "environment.json", folder)
    model = _read_json(folder / "model.json", folder)
    absent = [key for key in MODEL_COUNTS if not is_count(model.get(key))]
    if absent:
        version = environment.get("versions", {}).get("sret-scale", "a version that did not say")
        raise ValueError(
            f"{folder}/model.json has no number for {', '.join(absent)}: the folder was written by sret_scale "
            f"{version}. Report on it with that version, or train again"
        )
    status_file = folder / "status.json"
    lines, remarks = read_metrics(folder / "metrics.jsonl")
    return Run(
        name=folder.resolve().name,
        folder=folder,
        config=_read_yaml(folder / "config.yaml", folder),
        model=model,
        environment=environment,
        status=_read_json(status_file, folder) if status_file.is_file() else {},
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


def _with_distinct_names(runs: list[Run]) -> list[Run]:
    """The runs, those of equal folder name told apart by the shortest ends of their paths that differ."""
    ends = [_path_ends(run.folder) for run in runs]
    uses = Counter(end for own in ends for end in own)
    return [
        Run(**{**vars(run), "name": next((end for end in own if uses[end] == 1), own[-1])})
        for run, own in zip(runs, ends, strict=True)
    ]


def _path_ends(folder: Path) -> list[str]:
    """The last part of a path, the last two, and so on to all."""
    parts = folder.resolve().parts[1:]
    return ["/".join(parts[-length:]) for length in range(1, len(parts) + 1)]


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} has no {path.name}: the run failed before its first step, or another version wrote it"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): the run was killed while writing it; start the run again"
        ) from None
    return _mapping(value, path)


def _read_yaml(path: Path, folder: Path) -> dict[str, Any]:
    try:
        value = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} has no config.yaml: the run failed before its first step, or another version wrote it"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML ({' '.join(str(error).split())}): train the run again") from None
    return _mapping(value, path)


def _mapping(value: object, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a mapping: another version wrote it")
    return value
