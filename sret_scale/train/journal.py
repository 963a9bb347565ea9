"""What a run writes down of itself: lines of metrics.jsonl on rank 0, and sentences for whoever watches."""

import dataclasses
import resource

import torch

from data_pipelines.shards.classes import classes_without_samples, describe_missing
from sret_scale.train.assemble import Clock, Run
from sret_scale.train.distributed import max_over_ranks
from sret_scale.train.divergence import LeftOut, require_progress
from sret_scale.train.evaluate import Evaluation


def log(run: Run, clock: Clock, kind: str, values: dict[str, object]) -> None:
    """One line of metrics.jsonl, on rank 0."""
    place = {"step": clock.step, "images": clock.samples, "epoch": clock.loader.epoch, "time_s": round(clock.time_s, 3)}
    run.metrics.write(kind, place | values)


def log_start(run: Run, clock: Clock) -> None:
    """Where a continued run goes on, what the planner chose for this start, and what the test set cannot tell."""
    missing = classes_without_samples(run.test_shards)
    if missing:
        run.progress.say(describe_missing(missing, run.test_shards.folder))
    if clock.step or run.metrics.is_continued:
        log(run, clock, "restart", {"from_step": clock.step})
    if run.memory.plan:
        log(run, clock, "plan", run.memory.plan.to_json())


def log_compilation(run: Run) -> None:
    """What the step before compiled: the first step all; another one says so, since it waited for it."""
    if run.compiled and (news := run.compiled.news()):
        run.progress.say(f"{run.folder.path.name}: {news}")


def log_step(run: Run, clock: Clock, logged: Clock, numbers: dict[str, float]) -> None:
    """The numbers of a step, with the speed since `logged`."""
    rate = (clock.samples - logged.samples) / (clock.time_s - logged.time_s)
    log(run, clock, "train", {**numbers, "images_per_s": rate})
    run.progress.update(clock.samples, f"loss {numbers['loss']:.4f}  {rate:,.0f} {run.task.unit}/s")


def log_left_out(run: Run, clock: Clock, what: LeftOut) -> Clock:
    """Log an update that was left out; DivergedError after too many in a row. The clock, without fp16's own ones."""
    log(run, clock, "skipped", {"reason": what.reason, "is_overflow": what.is_overflow, "samples": what.samples})
    if what.is_overflow:
        return dataclasses.replace(clock, skipped_steps=0)
    run.progress.say(f"{run.folder.path.name}: update {clock.step:,} left out: {what.reason}")
    require_progress(clock.skipped_steps, run.config.train.max_skipped_steps, what, samples=clock.samples)
    return clock


def log_evaluation(run: Run, clock: Clock, kind: str, result: Evaluation) -> None:
    """What an evaluation of the `kind` of weights, "raw" or "ema", found."""
    log(run, clock, "eval", {"split": "test", "weights": kind, **result.to_json()})
    run.progress.say(
        f"{run.folder.path.name}: {clock.samples:,} {run.task.unit}: {run.task.best_in_words} "
        f"{result.numbers[run.task.best]:.2%} ({kind} weights, {result.num_samples:,} test {run.task.unit})"
    )


def log_telemetry(run: Run, clock: Clock) -> None:
    """What was read off the step that began at `clock`, if it was looked at; new alarms are said aloud too."""
    record = run.telemetry.after_update() if run.telemetry else None
    if run.telemetry and record is not None:
        log(run, clock, "telemetry", record)
        for sentence in run.telemetry.new_alarms:
            run.progress.say(f"{run.folder.path.name}: step {clock.step}: {sentence}")


def log_memory(run: Run, clock: Clock) -> None:
    """Peak memory of the process with the most, since it was started."""
    device = run.ranks.device
    is_gpu = device.type == "cuda"
    peak_rss = max_over_ranks(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, device)
    peak_device = max_over_ranks(torch.cuda.max_memory_allocated(device), device) if is_gpu else None
    predicted = run.memory.activations
    log(
        run,
        clock,
        "memory",
        {"peak_rss_bytes": peak_rss, "peak_device_bytes": peak_device, "predicted_activation_bytes": predicted},
    )


def log_stop(run: Run, clock: Clock) -> None:
    """Say that a signal ended the run here."""
    run.progress.say(f"stopped by a signal at {clock.samples:,} {run.task.unit}, saved; the same command continues")
