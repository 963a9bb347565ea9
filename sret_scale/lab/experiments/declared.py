"""An experiment declared in a YAML file: a base configuration, the fields that vary, and what is held equal.

    base: demo_student_108             a recipe, a model preset or a run's config.yaml
    set: {optim.weight_decay: 0.1}     fields that all runs change
    grid:                              every combination becomes a run
      model.stages.0.num_loops + model.stages.1.num_loops: [2, 4, [8, 12]]
      train.seed: [0, 1, 2]
    runs: [{model: sret_t_108}]        or single runs with their fields, `name` and `base` among them
    match: equal_images                or equal_flops, equal_parameters, equal_memory, see `matching`
    retries: 1                         starts after a failure, for each run

Fields joined by ` + ` vary together: one value for all, or a list with one each. A base that is a file is looked for
beside the experiment first, then in the working folder.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sret_scale.config.recipes import configuration, is_file_name
from sret_scale.config.run_config import RunConfig, build, read_yaml
from sret_scale.lab.experiments.matching import Match, counts, matched, with_images

NAME_LENGTH = 100


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What the file declares. `set` is spelled `fixed` here, since it is a word of Python."""

    base: str
    fixed: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    match: Match = "equal_images"
    retries: int = 1

    def __post_init__(self) -> None:
        if bool(self.grid) == bool(self.runs):
            raise ValueError("give either `grid` (every combination) or `runs` (a list), with at least one entry")
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{key} is empty: give at least one value")
        if self.retries < 0:
            raise ValueError(f"retries: expected 0 or more, got {self.retries}")


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of an experiment, with its counts."""

    name: str
    config: RunConfig
    applications: int
    parameters: int
    macs: int


def load_experiment(
    file: Path, ranks_of_nodes: Sequence[int] = (1,), *, changes: Sequence[str] = (), rehearsal: float = 1.0
) -> tuple[Experiment, list[PlannedRun]]:
    """The experiment of a file and its runs, in order. ValueError names the field, or the run and the bound.

    The ranks of a run matter to equal_memory alone: those that train share the global batch and the optimizer's state.
    `changes` are `section.field=value` for every run, `rehearsal` the part of its images that each sees.
    """
    tree = read_yaml(file)
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: expected `base`, and `grid` or `runs`, got {type(tree).__name__}")
    if "set" in tree:
        tree["fixed"] = tree.pop("set")
    try:
        experiment: Experiment = build(Experiment, tree)
        planned = plan_runs(experiment, file.parent, ranks_of_nodes, changes=changes)
        return experiment, [_rehearsed(run, rehearsal) for run in planned]
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def plan_runs(
    experiment: Experiment,
    folder: Path = Path(),
    ranks_of_nodes: Sequence[int] = (1,),
    *,
    changes: Sequence[str] = (),
) -> list[PlannedRun]:
    """Every run with its configuration, matched to the base as the experiment asks, under a name of its own."""
    own = _assignments(experiment.fixed)
    base = _base(experiment.base, folder, [*own, *changes])
    planned: dict[str, PlannedRun] = {}
    for variation in _variations(experiment):
        fields = {key: value for key, value in variation.items() if key not in ("name", "base")}
        name = _run_name({"name": variation["name"]} if "name" in variation else fields)
        if name in planned:
            raise ValueError(
                f"two runs would be called {name!r}: they do not differ, or only in characters that names cannot hold"
            )
        try:
            # Once more after the fields: a run that takes another model would undo a change of it.
            wanted = [*own, *changes, *_assignments(fields), *changes]
            config = _base(variation.get("base", experiment.base), folder, wanted)
            config = matched(config, base, experiment.match, varied=fields, ranks_of_nodes=ranks_of_nodes)
        except ValueError as error:
            raise ValueError(f"run {name}: {error}") from error
        planned[name] = _planned(name, config)
    return list(planned.values())


def _planned(name: str, config: RunConfig) -> PlannedRun:
    model = counts(config.model)
    applications, parameters, macs = model["applications"], model["parameters"], model["macs"]
    return PlannedRun(name=name, config=config, applications=applications, parameters=parameters, macs=macs)


def _rehearsed(run: PlannedRun, ratio: float) -> PlannedRun:
    """The run over this part of its images: warm-up, evaluations and checkpoints scale with them."""
    if not 0 < ratio <= 1:
        raise ValueError(f"--rehearse: expected a ratio above 0, at most 1, got {ratio}")
    if ratio == 1:
        return run
    try:
        return _planned(run.name, with_images(run.config, round(ratio * run.config.train.total_images)))
    except ValueError as error:
        raise ValueError(f"run {run.name}: {error}") from error


def _base(name: str, folder: Path, assignments: Sequence[str]) -> RunConfig:
    if not is_file_name(name):
        return configuration(name, assignments)
    beside = folder / name
    file = beside if beside.exists() else Path(name)
    if not file.exists():
        raise ValueError(f"base: there is no {beside}" + ("" if beside == file else f", and no {file}"))
    return configuration(str(file), assignments)


def _variations(experiment: Experiment) -> list[dict[str, Any]]:
    """The fields that each run sets, joined ones taken apart."""
    if experiment.runs:
        return [_apart(run) for run in experiment.runs]
    combinations = itertools.product(*experiment.grid.values())
    return [_apart(dict(zip(experiment.grid, values, strict=True))) for values in combinations]


def _apart(fields: Mapping[str, Any]) -> dict[str, Any]:
    single: dict[str, Any] = {}
    for joined, value in fields.items():
        keys = [key.strip() for key in joined.split(" + ")]
        values = value if isinstance(value, list) and len(keys) > 1 else [value] * len(keys)
        if len(values) != len(keys):
            raise ValueError(f"{joined}: expected one value for all or {len(keys)} values, got {value!r}")
        single.update(zip(keys, values, strict=True))
    return single


def _assignments(fields: Mapping[str, Any]) -> list[str]:
    """`section.field=value` as `override` takes it; `model` comes first, since it replaces what the others change."""
    return [f"{key}={json.dumps(fields[key])}" for key in sorted(fields, key=lambda key: key != "model")]


def _run_name(fields: Mapping[str, Any]) -> str:
    """A folder name that says what is special: the last part of each key and its value, equal neighbours once."""
    parts = dict.fromkeys(
        str(value) if key == "name" else f"{key.rpartition('.')[2]}-{value}" for key, value in fields.items()
    )
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(parts)).strip("-.")[:NAME_LENGTH] or "base"
