"""The training loop: from shards and a configuration to a run folder. Every rank runs it; the clock counts images.

    read a batch -> step -> log -> evaluate where due -> save where due -> until all images are seen, or a signal

A resumed run continues with the same bits as one that was never interrupted (`step`, `resume`).
"""

import contextlib
import dataclasses
import time

from sret_scale.config.run_config import RunConfig
from sret_scale.runs.run_folder import RunFolder
from sret_scale.train import journal
from sret_scale.train.assemble import Clock, Run, set_up
from sret_scale.train.batch_norm import measured_statistics
from sret_scale.train.distributed import Ranks
from sret_scale.train.evaluate import evaluate
from sret_scale.train.optim import WeightAverage
from sret_scale.train.resume import keep_best, restore, save
from sret_scale.train.step import optimizer_step
from sret_scale.train.stop import StopFlag
from sret_scale.train.telemetry.profile import step_profiler


def train(config: RunConfig, folder: RunFolder, ranks: Ranks) -> bool:
    """Train from the newest checkpoint, or from the start, to the end: True. False when a signal stopped the run."""
    settings, total = config.train, config.train.total_images
    with StopFlag() as stop, contextlib.ExitStack() as stack:
        # ---- set up, or take up again
        run = set_up(config, folder, ranks, stack)
        clock = restore(run)
        journal.log_start(run, clock)
        if not clock.is_evaluated and evaluate_weights(run, clock, stop, both=False):
            clock = dataclasses.replace(clock, is_evaluated=True)
        started = time.monotonic() - clock.time_s
        steps = stack.enter_context(contextlib.closing(run.loader.steps(clock.loader)))
        trace, num_profiled = folder.path / "profile.json", settings.profile_steps if ranks.is_main else 0
        step_is_done = stack.enter_context(step_profiler(trace, num_profiled, run.progress.say))
        logged = clock
        while clock.samples < total:
            # ---- one step
            with run.phase("waiting for data", clock):
                batches = next(steps)
            before, result = clock, optimizer_step(run, batches, clock, must_stop=lambda: stop.is_set)
            is_stopping = result.is_stopping
            step_is_done()
            journal.log_telemetry(run, before)
            journal.log_compilation(run)
            clock = Clock(
                step=before.step + 1,
                samples=before.samples + run.loader.global_batch_size,
                time_s=time.monotonic() - started,
                loader=batches.next_state,
                skipped_steps=before.skipped_steps + 1 if result.left_out else 0,
            )
            is_last = clock.samples >= total
            if result.left_out:
                clock = journal.log_left_out(run, clock, result.left_out)
            elif clock.step % settings.log_interval_steps == 0 or is_last or is_stopping:
                journal.log_step(run, clock, logged, result.numbers)
                logged = clock
            # ---- evaluate, before the save: a run that is killed in between measures again instead of never
            if is_due(before, clock, settings.eval_interval_images) and not is_last:
                is_evaluated = not is_stopping and evaluate_weights(run, clock, stop, both=False)
                clock = dataclasses.replace(clock, is_evaluated=is_evaluated)
                is_stopping |= not is_evaluated
                logged = dataclasses.replace(clock, time_s=time.monotonic() - started)
            # ---- save; at the end what is exported: the last average, with its own statistics
            if is_due(before, clock, settings.checkpoint_interval_images) or is_last or is_stopping:
                with run.phase("saving", clock):
                    if is_last and run.average:
                        load_average(run, run.average)
                    save(run, clock)
                logged = dataclasses.replace(clock, time_s=time.monotonic() - started)
            if is_stopping and not is_last:
                run.writer.wait()
                journal.log_stop(run, clock)
                return False
        # ---- the end
        if not evaluate_weights(run, clock, stop, both=True):
            return False
        journal.log_memory(run, clock)
        run.watchdog.progress(clock.step, "saving")
    return True


def is_due(before: Clock, after: Clock, interval_images: int) -> bool:
    """True when a multiple of the interval lies in (before, after]; an interval of 0 is never due."""
    return interval_images > 0 and before.samples // interval_images < after.samples // interval_images


def evaluate_weights(run: Run, clock: Clock, stop: StopFlag, *, both: bool) -> bool:
    """Measure the moving average where one is kept, and log it; the raw weights where none is, or with `both`.

    False when a signal broke it off.
    """
    kinds = {"ema": run.average.averages} if run.average else {}
    if both or not kinds:
        kinds["raw"] = run.engine.local_weights()
    with run.phase("evaluating", clock):
        for kind, local in kinds.items():
            if kind == "ema" and run.average:
                load_average(run, run.average)
            else:
                run.eval_model.load_state_dict(run.engine.assemble(local))
            result = evaluate(
                run.eval_model, run.test_shards, run.config, run.ranks, run.task, must_stop=lambda: stop.is_set
            )
            if result is None:
                run.progress.say(
                    f"{run.folder.path.name}: a signal broke an evaluation off; it is made after the restart"
                )
                return False
            journal.log_evaluation(run, clock, kind, result)
            keep_best(run, clock, kind, result)
    return True


def load_average(run: Run, average: WeightAverage) -> None:
    """The moving average into the model of evaluation, with BatchNorm's statistics, which the next checkpoint keeps."""
    run.eval_model.load_state_dict(run.engine.assemble(average.averages) | average.statistics)
    if not average.statistics:
        average.statistics = measured_statistics(run.eval_model, run.train_shards, run.config, run.ranks)
