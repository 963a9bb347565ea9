"""The training loop: from shards and a configuration to a run folder. Every rank runs it; the clock counts images.

Nothing in it draws from a global random generator. Permutations, drop path, crops and augmentation are functions of
(seed, step, rank, micro-step), so a resumed run continues with the same bits as one that was never interrupted.
"""

import contextlib
import dataclasses
import math
import resource
import time

import torch
from torch import Tensor

from data_pipelines.image.augment import normalise_
from data_pipelines.shards.classes import classes_without_samples, describe_missing
from data_pipelines.stream.loader import Batch, Step
from sret_scale.config.run_config import RunConfig
from sret_scale.config.step_depth import depth_plans, weighted_loss
from sret_scale.distill import distillation_loss, student_batch
from sret_scale.model.depth_plan import DepthPlan
from sret_scale.runs.run_folder import RunFolder
from sret_scale.train.assemble import Clock, Run, set_up
from sret_scale.train.batch_norm import measured_statistics
from sret_scale.train.distributed import Ranks, average_buffers, max_over_ranks, sum_over_ranks
from sret_scale.train.divergence import LeftOut, left_out, require_progress
from sret_scale.train.evaluate import evaluate
from sret_scale.train.optim import WeightAverage, peak_rate, schedule_factor, set_rates
from sret_scale.train.resume import pieces_of, restore, save
from sret_scale.train.seeds import derived_seed, noise_at
from sret_scale.train.stop import StopFlag


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """What came of a step: numbers to log, why its update was left out where it was, whether any rank must stop."""

    numbers: dict[str, float]
    left_out: LeftOut | None
    is_stopping: bool


def train(config: RunConfig, folder: RunFolder, ranks: Ranks) -> bool:
    """Train from the newest checkpoint, or from the start, to the end: True. False when a signal stopped the run."""
    with StopFlag() as stop, contextlib.ExitStack() as stack:
        run = set_up(config, folder, ranks, stack)
        clock = restore(run)
        log_start(run, clock)
        if not clock.is_evaluated and evaluate_and_log(run, clock, stop, both=False):
            clock = dataclasses.replace(clock, is_evaluated=True)
        started = time.monotonic() - clock.time_s
        steps = stack.enter_context(contextlib.closing(run.loader.steps(clock.loader)))
        logged = clock
        while clock.images < config.train.total_images:
            run.watchdog.progress(clock.step, "waiting for data")
            before, step = clock, next(steps)
            run.watchdog.progress(clock.step, "computing")
            result = optimizer_step(run, step, clock, stop)
            numbers, is_stopping = result.numbers, result.is_stopping
            log_telemetry(run, clock)
            clock = Clock(
                step=before.step + 1,
                images=before.images + run.loader.global_batch_size,
                time_s=time.monotonic() - started,
                loader=step.next_state,
                skipped_steps=before.skipped_steps + 1 if result.left_out else 0,
            )
            if result.left_out:
                clock = note_left_out(run, clock, result.left_out)
            is_last = clock.images >= config.train.total_images
            if not result.left_out and (clock.step % config.train.log_interval_steps == 0 or is_last or is_stopping):
                rate = (clock.images - logged.images) / (clock.time_s - logged.time_s)
                log(run, clock, "train", {**numbers, "images_per_s": rate})
                logged = clock
                run.progress.update(clock.images, loss=numbers["loss"], images_per_s=rate)
            if is_due(before, clock, config.train.eval_interval_images) and not is_last:
                # Before the checkpoint: a run that is killed in between measures again instead of never.
                is_evaluated = not is_stopping and evaluate_and_log(run, clock, stop, both=False)
                clock = dataclasses.replace(clock, is_evaluated=is_evaluated)
                is_stopping |= not is_evaluated
                logged = dataclasses.replace(clock, time_s=time.monotonic() - started)
            if is_due(before, clock, config.train.checkpoint_interval_images) or is_last or is_stopping:
                run.watchdog.progress(clock.step, "saving")
                if is_last and run.average:
                    # What is exported is the last average, with its own statistics.
                    load_average(run, run.average)
                save(run, clock)
                logged = dataclasses.replace(clock, time_s=time.monotonic() - started)
            if is_stopping and not is_last:
                run.writer.wait()
                run.progress.say(f"stopped by a signal at {clock.images:,} images, saved; the same command continues")
                return False
        if not evaluate_and_log(run, clock, stop, both=True):
            return False
        log_memory(run, clock)
        run.watchdog.progress(clock.step, "saving")
    return True


def optimizer_step(run: Run, step: Step, clock: Clock, stop: StopFlag) -> StepResult:
    """One update on the global batch of `step`.

    Where a loss or the gradient is not finite, on any rank, it is left out on all: weights, optimiser, moving average
    and BatchNorm's statistics stay as they were, bit for bit.
    """
    config, ranks = run.config, run.ranks
    optim, total_images = config.optim, config.train.total_images
    rate = peak_rate(optim, run.loader.global_batch_size) * schedule_factor(
        clock.images,
        total_images=total_images,
        warmup_images=optim.warmup_images,
        final_ratio=optim.final_rate_ratio,
    )
    set_rates(run.engine.param_groups, rate)
    statistics = {name: value.clone() for name, value in run.engine.buffers().items()}
    losses = torch.zeros((), device=ranks.device)
    for micro_step, batch in enumerate(step.micro_batches):
        loss = micro_batch_loss(run, batch, clock, micro_step)
        losses += loss.detach() / len(step.micro_batches)
        run.engine.backward(loss)
        if micro_step < len(step.micro_batches) - 1:
            run.engine.step()
    run.watchdog.progress(clock.step, "in a collective")
    # All ranks must agree before the update: a loss that is not a number on one of them would spread to all.
    shared = torch.zeros(1 + ranks.world_size, device=ranks.device)
    shared[0], shared[1 + ranks.rank] = float(stop.is_set or run.writer.has_failed), losses
    num_stopping, *rank_losses = sum_over_ranks(shared).tolist()
    if run.telemetry:
        run.telemetry.before_update()
    what = None
    if run.engine.step(is_rejected=not all(map(math.isfinite, rank_losses))):
        average_buffers(run.engine.buffers())
        if run.average:
            run.average.update(run.engine.local_weights(), run.loader.global_batch_size)
        # Here at the latest there are moments: a start's first step pays for the memory, not its first save.
        run.writer.reserve(pieces_of(run))
    else:
        for name, value in run.engine.buffers().items():
            value.copy_(statistics[name])
        norms, is_overflow = run.engine.last_norms, run.engine.has_overflowed
        what = left_out(step, run.train_shards, rank_losses=rank_losses, norms=norms, is_overflow=is_overflow)
    numbers = {"loss": sum(rank_losses) / ranks.world_size, "lr": rate, "grad_norm": run.engine.grad_norm()}
    return StepResult(numbers=numbers, left_out=what, is_stopping=num_stopping > 0)


def note_left_out(run: Run, clock: Clock, what: LeftOut) -> Clock:
    """Log an update that was left out; DivergedError after too many in a row. The clock, without fp16's own ones."""
    log(run, clock, "skipped", {"reason": what.reason, "is_overflow": what.is_overflow, "samples": what.samples})
    if what.is_overflow:
        return dataclasses.replace(clock, skipped_steps=0)
    run.progress.say(f"{run.folder.path.name}: update {clock.step:,} left out: {what.reason}")
    require_progress(clock.skipped_steps, run.config.train.max_skipped_steps, what, images=clock.images)
    return clock


def micro_batch_loss(run: Run, batch: Batch, clock: Clock, micro_step: int) -> Tensor:
    """The mean loss of one rank's micro-batch."""
    config, ranks = run.config, run.ranks
    here = (config.train.seed, clock.step, micro_step, ranks.rank)
    unit_BCHW, target_BC, teacher_log_probs_BC = student_batch(
        batch,
        run.augment,
        run.teacher,
        seed=derived_seed("augment", *here),
        device=ranks.device,
        teacher_input=config.distill.teacher_input,
    )
    run.watchdog.progress(clock.step, "computing")
    noise = noise_at(*here)
    if config.model.permutation == "random":
        # The reference's way draws from the global generator: here too, a function of the step.
        torch.manual_seed(derived_seed("global", *here))
    settings = config.distill.at(clock.images / config.train.total_images)
    images_BCHW = normalise_(unit_BCHW, config.train.image_mean, config.train.image_std)

    def loss_of(logits_BC: Tensor, part: slice = slice(None)) -> Tensor:
        known_BC = None if teacher_log_probs_BC is None else teacher_log_probs_BC[part]
        return distillation_loss(logits_BC, known_BC, target_BC[part], settings)

    plans = plans_of(config, clock)
    if run.telemetry and micro_step == 0 and run.telemetry.is_due(clock.step):
        run.telemetry.look(images_BCHW, loss_of, noise, plans[0] if plans else None)
    if plans is None:
        loss = loss_of(run.engine.forward(images_BCHW, noise))
    else:
        scores_KBC = run.engine.forward(images_BCHW, noise, plans)
        loss = weighted_loss(config.depth, plans, [loss_of(scores_BC) for scores_BC in scores_KBC])
    if run.features:
        loss = loss + settings.feature_weight * run.features.loss()
    return loss


def plans_of(config: RunConfig, clock: Clock) -> tuple[DepthPlan, ...] | None:
    """The depth of a step: the same on every rank, in every micro-step and after a restart."""
    progress = clock.images / (config.depth.growth_images or config.train.total_images)
    return depth_plans(config.depth, config.model, seed=config.train.seed, step=clock.step, progress=progress)


def is_due(before: Clock, after: Clock, interval_images: int) -> bool:
    """True when a multiple of the interval lies in (before, after]; an interval of 0 is never due."""
    return interval_images > 0 and before.images // interval_images < after.images // interval_images


def log(run: Run, clock: Clock, kind: str, values: dict[str, object]) -> None:
    """One line of metrics.jsonl, on rank 0."""
    place = {"step": clock.step, "images": clock.images, "epoch": clock.loader.epoch, "time_s": round(clock.time_s, 3)}
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


def evaluate_and_log(run: Run, clock: Clock, stop: StopFlag, *, both: bool) -> bool:
    """Accuracy of the moving average where one is kept; of the raw weights where none is, or with `both`.

    False when a signal broke it off.
    """
    run.watchdog.progress(clock.step, "evaluating")
    kinds = {"ema": run.average.averages} if run.average else {}
    if both or not kinds:
        kinds["raw"] = run.engine.local_weights()
    for kind, local in kinds.items():
        if kind == "ema" and run.average:
            load_average(run, run.average)
        else:
            run.eval_model.load_state_dict(run.engine.assemble(local))
        result = evaluate(run.eval_model, run.test_shards, run.config, run.ranks, must_stop=lambda: stop.is_set)
        if result is None:
            run.progress.say(f"{run.folder.path.name}: a signal broke an evaluation off; it is made after the restart")
            return False
        log(run, clock, "eval", {"split": "test", "weights": kind, **dataclasses.asdict(result)})
        run.progress.say(
            f"{run.folder.path.name}: {clock.images:,} images: top-1 {result.top1:.2%} ({kind} weights, "
            f"{result.num_samples:,} test images)"
        )
    return True


def load_average(run: Run, average: WeightAverage) -> None:
    """The moving average into the model of evaluation, with BatchNorm's statistics, which the next checkpoint keeps."""
    run.eval_model.load_state_dict(run.engine.assemble(average.averages) | average.statistics)
    if not average.statistics:
        average.statistics = measured_statistics(run.eval_model, run.train_shards, run.config, run.ranks)


def log_telemetry(run: Run, clock: Clock) -> None:
    """What was read off the step that began at `clock`, if it was looked at; new alarms are said aloud too."""
    record = run.telemetry.after_update() if run.telemetry else None
    if run.telemetry and record is not None:
        log(run, clock, "telemetry", record)
        for sentence in run.telemetry.unsaid(record["alarms"]):
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
