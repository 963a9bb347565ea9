"""One rank of tests of depth and telemetry in training: `python -m tests.ranks.depth_ranks FOLDER RUN...`.

Trains the run folders `FOLDER/RUN` (each with a config.yaml) one after another to their ends, in one process. `RUN@N`
deletes the checkpoints of a run after step N instead, as if it had been killed before it came further. `RUN?` leaves
RUN/exits.json instead, its curve of early exits.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from sret_scale.config.run_config import from_yaml
from sret_scale.lab.early_exit import exit_points
from sret_scale.runs.checkpoint import list_checkpoints
from sret_scale.runs.run_folder import RunFolder
from sret_scale.train.distributed import leave, ranks_from_environment
from sret_scale.train.engine.engine import start_communication
from sret_scale.train.loop import train


def forget(folder: RunFolder, step: int) -> None:
    for checkpoint in list_checkpoints(folder.checkpoints):
        if checkpoint.name > f"step-{step:09d}":
            shutil.rmtree(checkpoint)


def exit_request(run: Path) -> dict[str, Any]:
    asked = {"run": str(run), "shards": None, "weights": None, "loops": None}
    return asked | {"kind": "convergence", "thresholds": [1e6, 0.3, 1e-9]}


def main() -> None:
    folder, *runs = sys.argv[1:]
    ranks = ranks_from_environment()
    start_communication(ranks)
    for run in runs:
        if run.endswith("?"):
            points = exit_points(exit_request(Path(folder) / run[:-1]), ranks)
            if ranks.is_main:
                (Path(folder) / run[:-1] / "exits.json").write_text(json.dumps(points))
            continue
        run, _, step = run.partition("@")
        if step:
            if ranks.is_main:
                forget(RunFolder(Path(folder) / run), int(step))
            continue
        path = Path(folder) / run
        assert train(from_yaml(path / "config.yaml"), RunFolder(path), ranks)
    leave()


if __name__ == "__main__":
    main()
