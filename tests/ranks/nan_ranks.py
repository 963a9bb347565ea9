"""One rank of the tests of updates that are left out: `python -m tests.ranks.nan_ranks CONFIG OUT_FOLDER`.

Whole runs in which rank 1 meets images that are NaN in some steps: straight, stopped among them and continued, and too
often in a row.
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sret_scale.config.run_config import RunConfig, from_yaml
from sret_scale.distill import student_batch
from sret_scale.model.noise import derived_seed
from sret_scale.runs.run_folder import RunFolder
from sret_scale.tasks import classification
from sret_scale.train import loop, step
from sret_scale.train.batch_norm import measured_statistics
from sret_scale.train.distributed import Ranks, leave, ranks_from_environment
from sret_scale.train.divergence import DivergedError
from sret_scale.train.engine.engine import start_communication

BAD_STEPS = (3, 4)
LIMIT = 3


def run(config: RunConfig, path: Path, ranks: Ranks, *, bad_steps: range | tuple[int, ...], stop_in: int = -1) -> bool:
    """`train`, with NaN for rank 1 in the second micro-step of `bad_steps`; a signal stops rank 1 in step `stop_in`."""
    path.mkdir(parents=True, exist_ok=True)
    place: list[tuple[int, ...]] = []

    def seen(purpose: str, *numbers: int) -> int:
        if purpose == "augment":
            place.append(numbers)
        return derived_seed(purpose, *numbers)

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        images_BCHW, *others = student_batch(*args, **kwargs)
        _, number, micro_step, rank = place[-1]
        if number == stop_in and rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        if number in bad_steps and micro_step == 1 and rank == 1:
            images_BCHW = torch.full_like(images_BCHW, torch.nan)
        return images_BCHW, *others

    def measured(*args: Any) -> Any:
        with (path / f"measured.{ranks.rank}").open("a") as log:
            log.write("measured\n")
        return measured_statistics(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "derived_seed", seen)
        patch.setattr(classification, "student_batch", poisoned)
        patch.setattr(loop, "measured_statistics", measured)
        return loop.train(config, RunFolder(path), ranks)


def main(config_file: Path, folder: Path) -> None:
    ranks = ranks_from_environment()
    start_communication(ranks)
    config = from_yaml(config_file)
    assert run(config, folder / "straight", ranks, bad_steps=BAD_STEPS)
    # It has come to its end: this start evaluates it once more.
    assert run(config, folder / "straight", ranks, bad_steps=BAD_STEPS)
    assert not run(config, folder / "resumed", ranks, bad_steps=BAD_STEPS, stop_in=BAD_STEPS[0])
    assert run(config, folder / "resumed", ranks, bad_steps=BAD_STEPS)
    limited = replace(config, train=replace(config.train, max_skipped_steps=LIMIT))
    try:
        run(limited, folder / "lost", ranks, bad_steps=range(2, 100))
    except DivergedError as error:
        (folder / f"lost.{ranks.rank}.txt").write_text(str(error))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
