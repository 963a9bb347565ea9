"""What every rank of an evaluation runs: `python -m sret_scale.train.evaluate_main FOLDER/request.json`.

The folder takes the place of a run folder for the launcher: status, logs and error records of the evaluation go there.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from data_pipelines.remote import open_data
from sret_scale.train.distributed import Ranks, leave, ranks_from_environment
from sret_scale.train.evaluate import evaluate
from sret_scale.train.load import load_config, load_model
from sret_scale.train.run_folder import EXIT_FINISHED, RunFolder, write_json


def evaluate_run(run: Path, shards: str | None, weights: Any, ranks: Ranks) -> dict[str, Any]:
    """The accuracy of a run's newest checkpoint on `shards` (None: its test set), as a JSON object; on every rank."""
    config = load_config(run)
    opened = open_data(shards or config.data.test_folder, config.data)
    if opened.num_classes != config.model.num_classes:
        raise ValueError(
            f"{opened.folder} has {opened.num_classes} classes, the model of {run} has {config.model.num_classes}"
        )
    model, kind, step = load_model(run, weights, print)
    result = evaluate(model.to(ranks.device), opened, config, ranks)
    assert result is not None, "nothing here asks it to stop"
    return {
        "run": str(run),
        "shards": str(opened.folder),
        "step": step,
        "weights": kind,
        **dataclasses.asdict(result),
    }


def main() -> None:
    """One rank's share; rank 0 leaves result.json beside the request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("request", type=Path)
    file: Path = parser.parse_args().request
    request = json.loads(file.read_text(encoding="utf-8"))
    # Importing deepspeed costs seconds, and an evaluation in one process does without it.
    from sret_scale.train.engine import start_communication

    ranks = ranks_from_environment()
    start_communication(ranks)
    result = evaluate_run(Path(request["run"]), request["shards"], request["weights"], ranks)
    if ranks.is_main:
        write_json(file.with_name("result.json"), result)
        RunFolder(file.parent).write_status("finished", EXIT_FINISHED)
    leave()


if __name__ == "__main__":
    main()
