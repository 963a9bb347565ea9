"""Runs an experiment: one run after another, each an ordinary run folder, so that the same command continues it."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from sret_scale.lab.depth import FLOPS_PER_MAC_OF_TRAINING
from sret_scale.lab.experiment import Experiment, PlannedRun
from sret_scale.lab.numbers import binary_size, compact, grouped
from sret_scale.memory import MemoryConfig, predict_activations
from sret_scale.model import SReTConfig
from sret_scale.train.config import RunConfig
from sret_scale.train.ds_config import load_ds_config, precision_of
from sret_scale.train.run_folder import EXIT_FINISHED, EXIT_STOPPED, RunFolder
from sret_scale.train.start import is_finished

# Checks and starts one run, or continues it; returns its exit status. ValueError and OSError are refusals of its input.
Start = Callable[[RunConfig, Path], int]


def run_sweep(
    experiment: Experiment, planned: Sequence[PlannedRun], folder: Path, *, start: Start, say: Callable[[str], None]
) -> int:
    """Every run of the experiment into `folder`/NAME; 0, 85 if a signal stopped it, or 1 if a run failed at the end.

    Finished runs are skipped, a failed one is started again `retries` times and then reported; the others go on.
    """
    failures: list[str] = []
    for number, run in enumerate(planned, start=1):
        place = f"[{number}/{len(planned)}] {run.name}"
        if is_finished(RunFolder(folder / run.name)):
            say(f"{place}: finished before")
            continue
        say(f"{place}: {run.applications} applications, {run.config.train.total_images:,} images")
        failure, stopped = _attempt(run, folder / run.name, experiment.retries, start, say)
        if stopped:
            say("stopped by a signal: the same command continues")
            return EXIT_STOPPED
        if failure:
            failures.append(f"{run.name}: {failure}")
    for failure in failures:
        say(f"failed: {failure}")
    say(f"{len(planned) - len(failures)} of {len(planned)} runs finished in {folder}")
    return 1 if failures else EXIT_FINISHED


def _attempt(
    run: PlannedRun, folder: Path, retries: int, start: Start, say: Callable[[str], None]
) -> tuple[str | None, bool]:
    """Why the run failed after all attempts (None: it finished), and whether a signal stopped it."""
    status = EXIT_FINISHED
    for attempt in range(1 + retries):
        try:
            status = start(run.config, folder)
        except (ValueError, OSError) as error:
            # A refused input would be refused again: no retry, and the other runs do not depend on it.
            return str(error), False
        if status in (EXIT_FINISHED, EXIT_STOPPED):
            return None, status == EXIT_STOPPED
        say(f"{run.name}: attempt {attempt + 1} of {1 + retries} failed with exit status {status}")
    return f"exit status {status} after {1 + retries} attempts, see {folder}", False


def sweep_table(planned: Sequence[PlannedRun]) -> str:
    """The runs and what each will cost, as a table for the terminal. Predicting memory takes seconds a depth."""
    header = ("run", "applications", "parameters", "MACs", "images", "training FLOPs", "activations")
    rows = [header]
    for run in planned:
        rows.append(
            (
                run.name,
                grouped(run.applications),
                compact(run.parameters),
                compact(run.macs),
                grouped(run.config.train.total_images),
                compact(FLOPS_PER_MAC_OF_TRAINING * run.macs * run.config.train.total_images),
                binary_size(_activation_bytes(run.config)),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    return "\n".join(lines)


def _activation_bytes(config: RunConfig) -> int | None:
    """Predicted activations of a rank; None where the schedule is left to the planner, which keeps its budget."""
    if config.memory.budget_bytes is not None:
        return None
    precision = precision_of(load_ds_config(config.engine.ds_config))
    return _predicted(config.model, config.memory, config.train.micro_batch_size, precision)


@functools.cache
def _predicted(model: SReTConfig, memory: MemoryConfig, micro_batch_size: int, precision: str) -> int:
    """Once for all seeds and rates of a depth."""
    return predict_activations(model, memory, micro_batch_size=micro_batch_size, precision=precision)
