"""Which runs of an experiment a start would refuse, and why: all that `train` checks before it starts one."""

from collections.abc import Sequence
from pathlib import Path

from sret_scale.config.run_config import whole_paths
from sret_scale.lab.experiments.declared import PlannedRun
from sret_scale.launch.preflight import check_configuration, check_start
from sret_scale.runs.rank_errors import in_words
from sret_scale.runs.run_folder import RunFolder

MOST_NAMES = 3


def refusal(run: PlannedRun, folder: Path, ranks_of_nodes: Sequence[int]) -> str:
    """The sentence with which a start in `folder`/NAME would refuse the run; empty where it would not."""
    config = whole_paths(run.config)
    try:
        check_start(config, folder / run.name, ranks_of_nodes)
        check_configuration(RunFolder(folder / run.name), config)
    except (ValueError, OSError) as error:
        return in_words(error)
    return ""


def check_all(planned: Sequence[PlannedRun], folder: Path, ranks_of_nodes: Sequence[int]) -> None:
    """Raise ValueError with every reason, and whom it concerns, where a run would be refused."""
    names: dict[str, list[str]] = {}
    for run in planned:
        if reason := refusal(run, folder, ranks_of_nodes):
            names.setdefault(reason, []).append(run.name)
    if names:
        refused = sum(map(len, names.values()))
        told = [f"{reason} ({_some(concerned)})" for reason, concerned in names.items()]
        raise ValueError(f"{refused} of {len(planned)} runs would be refused: {'; '.join(told)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")
