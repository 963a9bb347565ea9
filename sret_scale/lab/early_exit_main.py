"""What every rank of an early-exit evaluation runs: `python -m sret_scale.lab.early_exit_main FOLDER/request.json`."""

from pathlib import Path
from typing import Any

from sret_scale.lab.early_exit import ExitPoint, exit_curve
from sret_scale.model.vision.sret import as_sret
from sret_scale.train.distributed import Ranks
from sret_scale.train.evaluate_main import answer, evaluator_of


def exit_points(request: dict[str, Any]) -> list[ExitPoint]:
    """The curve that a request asks for, on every rank."""
    model, measure = evaluator_of(Path(request["run"]), request["shards"], request["weights"], request["loops"])
    return exit_curve(as_sret(model, "early exit"), request["kind"], request["thresholds"], measure)


def _points(request: dict[str, Any], ranks: Ranks) -> list[dict[str, float | None]]:
    return [vars(point) for point in exit_points(request)]


if __name__ == "__main__":
    answer(_points)
