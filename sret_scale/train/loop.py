"""The training loop: from shards and a configuration to a run folder. Every rank runs it; the clock counts images.

Nothing in it draws from a global random generator. Permutations, drop path, crops and augmentation are functions of
(seed, step, rank, micro-step), so a resumed run continues with the same bits as one that was never interrupted.
"""

import contextlib
import dataclasses
import math
import resource
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data_pipelines.augment import BatchAugment, normalise
from data_pipelines.index import ShardSet, open_shards
from data_pipelines.loader import Batch, LoaderState, Step, TrainLoader
from sret_scale.distill import Teacher, build_teacher, distillation_loss
from sret_scale.memory import apply_recomputation
from sret_scale.model import Noise, SReT, Stage
from sret_scale.train.checkpoint import newest_valid, prune_checkpoints, read_state, read_tensors, save_checkpoint
from sret_scale.train.config import RunConfig, grad_accum_steps, to_plain
from sret_scale.train.distributed import Ranks, average_buffers, from_main_rank, max_over_ranks, sum_over_ranks
from sret_scale.train.ds_config import load_ds_config
from sret_scale.train.engine import Engine
from sret_scale.train.evaluate import evaluate
from sret_scale.train.load import check_architecture, load_teacher_run
from sret_scale.train.optim import WeightAverage, build_optimizer, peak_rate, schedule_factor, set_rates
from sret_scale.train.progress import RunProgress
from sret_scale.train.run_folder import MetricsLog, RunFolder
from sret_scale.train.stop import StopFlag


class DivergedError(ValueError):
    """The loss or the gradient is not a number any more."""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How far a run has come. `time_s` adds up all its starts."""

    step: int = 0
    images: int = 0
    time_s: float = 0.0
    loader: LoaderState = field(default_factory=LoaderState)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run that the functions below share."""

    config: RunConfig
    folder: RunFolder
    ranks: Ranks
    loader: TrainLoader
    test_shards: ShardSet
    augment: BatchAugment
    engine: Engine
    average: WeightAverage | None
    teacher: Teacher | None
    eval_model: SReT
    metrics: MetricsLog
    progress: RunProgress


def train(config: RunConfig, folder: RunFolder, ranks: Ranks) -> bool:
    """Train from the newest checkpoint, or from the start, to the end: True. False when a signal stopped the run."""
    with StopFlag() as stop, contextlib.ExitStack() as stack:
        run = set_up(config, folder, ranks, stack)
        clock = restore(run)
        started = time.monotonic() - clock.time_s
        steps = stack.enter_context(contextlib.closing(run.loader.steps(clock.loader)))
        logged = clock
        while clock.images < config.train.total_images:
            before, step = clock, next(steps)
            numbers, is_stopping = optimizer_step(run, step, clock, stop)
            clock = Clock(
                step=before.step + 1,
                images=before.images + run.loader.global_batch_size,
                time_s=time.monotonic() - started,
                loader=step.next_state,
            )
            is_last = clock.images >= config.train.total_images
            if clock.step % config.train.log_interval_steps == 0 or is_last or is_stopping:
                rate = (clock.images - logged.images) / (clock.time_s - logged.time_s)
                log(run, clock, "train", {**numbers, "images_per_s": rate})
                logged = clock
                run.progress.update(clock.images, loss=numbers["loss"], images_per_s=rate)
            if is_due(before, clock, config.train.eval_interval_images) and not is_last:
                # Before the checkpoint: a run that is killed in between measures again instead of never.
                evaluate_and_log(run, clock, both=False)
            if is_due(before, clock, config.train.checkpoint_interval_images) or is_last or is_stopping:
                save(run, clock)
            if is_stopping and not is_last:
                run.progress.say(f"stopped by a signal at {clock.images:,} images, saved; the same command continues")
                return False
        evaluate_and_log(run, clock, both=True)
        log_memory(run, clock)
    return True


def set_up(config: RunConfig, folder: RunFolder, ranks: Ranks, stack: contextlib.ExitStack) -> Run:
    """Model, engine, data, teacher and logs; the initial weights are a function of the seed alone."""
    accumulation = grad_accum_steps(config.train, ranks.world_size)
    loader = TrainLoader(
        open_shards(config.data.train_folder),
        dataclasses.replace(config.data, quarantine_file=config.data.quarantine_file or str(folder.quarantine)),
        image_size=config.model.image_size,
        seed=config.train.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        micro_batch_size=config.train.micro_batch_size,
        grad_accum_steps=accumulation,
    )
    torch.manual_seed(config.train.seed)
    model = SReT(config.model).to(ranks.device)
    apply_recomputation(model, config.memory)
    engine = Engine(
        model,
        build_optimizer(model, model.parameter_tags(), config.optim),
        load_ds_config(config.engine.ds_config),
        micro_batch_size=config.train.micro_batch_size,
        grad_accum_steps=accumulation,
        z3_leaf_modules=(Stage,),
    )
    horizon = config.optim.ema_horizon_images
    return Run(
        config=config,
        folder=folder,
        ranks=ranks,
        loader=loader,
        test_shards=open_shards(config.data.test_folder),
        augment=BatchAugment(config.augment, config.model.num_classes),
        engine=engine,
        average=WeightAverage(engine.local_weights(), horizon) if horizon else None,
        teacher=set_up_teacher(config, ranks) if config.distill.teacher else None,
        eval_model=SReT(config.model).to(ranks.device).eval(),
        metrics=stack.enter_context(MetricsLog(folder.metrics if ranks.is_main else None)),
        progress=stack.enter_context(
            RunProgress(folder.path.name, total_images=config.train.total_images, is_shown=ranks.is_main)
        ),
    )


def set_up_teacher(config: RunConfig, ranks: Ranks) -> Teacher:
    """The frozen teacher of the configuration, outside everything that is trained, averaged or saved."""
    assert config.distill.teacher
    return build_teacher(
        config.distill.teacher,
        num_classes=config.model.num_classes,
        device=ranks.device,
        load_run=load_teacher_run,
        micro_batch_size=config.distill.teacher_micro_batch_size,
        precision=config.distill.teacher_precision,
        compiled=config.distill.teacher_compile,
    )


def optimizer_step(run: Run, step: Step, clock: Clock, stop: StopFlag) -> tuple[dict[str, float], bool]:
    """One update on the global batch of `step`: (loss, rate and gradient norm to log, whether any rank must stop)."""
    config, ranks = run.config, run.ranks
    optim, total_images = config.optim, config.train.total_images
    rate = peak_rate(optim, run.loader.global_batch_size) * schedule_factor(
        clock.images,
        total_images=total_images,
        warmup_images=optim.warmup_images,
        final_ratio=optim.final_rate_ratio,
    )
    set_rates(run.engine.param_groups, rate)
    losses = torch.zeros((), device=ranks.device)
    for micro_step, batch in enumerate(step.micro_batches):
        loss = micro_batch_loss(run, batch, clock, micro_step)
        losses += loss.detach() / len(step.micro_batches)
        run.engine.backward(loss)
        if micro_step < len(step.micro_batches) - 1:
            run.engine.step()
    # All ranks must agree before the update: a loss that is not a number on one of them would spread to all.
    mean_loss, num_stopping = sum_over_ranks(
        torch.stack([losses / ranks.world_size, torch.tensor(float(stop.is_set), device=ranks.device)])
    ).tolist()
    if not math.isfinite(mean_loss):
        raise diverged(run, step, clock, "the loss", mean_loss)
    run.engine.step()
    if not math.isfinite(run.engine.grad_norm()):
        raise diverged(run, step, clock, "the gradient norm", run.engine.grad_norm())
    average_buffers(run.engine.model)
    if run.average:
        run.average.update(run.engine.local_weights(), run.loader.global_batch_size)
    return {"loss": mean_loss, "lr": rate, "grad_norm": run.engine.grad_norm()}, num_stopping > 0


def micro_batch_loss(run: Run, batch: Batch, clock: Clock, micro_step: int) -> Tensor:
    """The mean loss of one rank's micro-batch."""
    config, ranks = run.config, run.ranks
    here = (config.train.seed, clock.step, micro_step, ranks.rank)
    unit_BCHW, target_BC = run.augment(
        batch.images.to(ranks.device, non_blocking=True),
        batch.labels.to(ranks.device, non_blocking=True),
        seed=derived_seed("augment", *here),
    )
    noise = Noise(
        permutation_seed=derived_seed("permutation", config.train.seed, clock.step),
        sample_seed=derived_seed("sample", *here),
    )
    teacher_logits_BC = run.teacher(unit_BCHW) if run.teacher else None
    logits_BC = run.engine.forward(normalise(unit_BCHW, config.train.image_mean, config.train.image_std), noise)
    settings = config.distill.at(clock.images / config.train.total_images)
    return distillation_loss(logits_BC, teacher_logits_BC, target_BC, settings)


def derived_seed(purpose: str, *numbers: int) -> int:
    """A 63-bit seed that is a function of its arguments."""
    entropy = [int.from_bytes(purpose.encode(), "little"), *numbers]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def diverged(run: Run, step: Step, clock: Clock, what: str, value: float) -> DivergedError:
    """The error that ends a run before the bad update is saved; it names where and with which samples."""
    samples = [index for batch in step.micro_batches for index in batch.indices.tolist()]
    return DivergedError(
        f"{what} is {value} at step {clock.step + 1} ({clock.images:,} images seen; samples of rank {run.ranks.rank}: "
        f"{samples[:8]}...). Nothing of this step was saved. Lower optim.learning_rate, or choose another branch scheme"
    )


def is_due(before: Clock, after: Clock, interval_images: int) -> bool:
    """True when a multiple of the interval lies in (before, after]; an interval of 0 is never due."""
    return interval_images > 0 and before.images // interval_images < after.images // interval_images


def log(run: Run, clock: Clock, kind: str, values: dict[str, object]) -> None:
    """One line of metrics.jsonl, on rank 0."""
    place = {"step": clock.step, "images": clock.images, "epoch": clock.loader.epoch, "time_s": round(clock.time_s, 3)}
    run.metrics.write(kind, place | values)


def evaluate_and_log(run: Run, clock: Clock, *, both: bool) -> None:
    """Accuracy of the moving average where one is kept; of the raw weights where none is, or with `both`."""
    kinds = {"ema": run.average.averages} if run.average else {}
    if both or not kinds:
        kinds["raw"] = run.engine.local_weights()
    for kind, local in kinds.items():
        run.eval_model.load_state_dict(run.engine.assemble(local))
        with run.engine.precision():
            result = evaluate(run.eval_model, run.test_shards, run.config, run.ranks)
        log(run, clock, "eval", {"split": "test", "weights": kind, **dataclasses.asdict(result)})
        run.progress.say(
            f"{run.folder.path.name}: {clock.images:,} images: top-1 {result.top1:.2%} ({kind} weights, "
            f"{result.num_samples:,} test images)"
        )


def log_memory(run: Run, clock: Clock) -> None:
    """Peak memory of the process with the most, since it was started."""
    device = run.ranks.device
    is_gpu = device.type == "cuda"
    peak_rss = max_over_ranks(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, device)
    peak_device = max_over_ranks(torch.cuda.max_memory_allocated(device), device) if is_gpu else None
    log(run, clock, "memory", {"peak_rss_bytes": peak_rss, "peak_device_bytes": peak_device})


def save(run: Run, clock: Clock) -> None:
    """A checkpoint of everything that decides how the run goes on."""
    tensors = {"weights": run.engine.weights(), "optimizer": run.engine.optimizer_state()}
    if run.average:
        tensors["ema"] = run.engine.assemble(run.average.averages)
    if run.ranks.is_main:
        state = {
            "images": clock.images,
            "time_s": clock.time_s,
            "loader": clock.loader.to_json(),
            "ema_updates": run.average.num_updates if run.average else 0,
            "model": to_plain(run.config.model),
        }
        save_checkpoint(run.folder.checkpoints, step=clock.step, tensors=tensors, state=state)
        prune_checkpoints(run.folder.checkpoints, run.config.train.keep_checkpoints)


def restore(run: Run) -> Clock:
    """Load the newest whole checkpoint into the run, on whose choice all ranks agree; the start where there is none."""
    checkpoint = from_main_rank(newest_valid(run.folder.checkpoints, run.progress.say) if run.ranks.is_main else None)
    if checkpoint is None:
        return Clock()
    state = read_state(checkpoint)
    check_architecture(run.config.model, state["model"], str(checkpoint))
    run.engine.load_weights(read_tensors(checkpoint, "weights"))
    run.engine.load_optimizer_state(read_tensors(checkpoint, "optimizer"))
    if run.average:
        run.average.averages = run.engine.partition(read_tensors(checkpoint, "ema"))
        run.average.num_updates = state["ema_updates"]
    clock = Clock(
        step=state["step"],
        images=state["images"],
        time_s=state["time_s"],
        loader=LoaderState.from_json(state["loader"]),
    )
    log(run, clock, "restart", {"from_step": clock.step})
    run.progress.continue_from(clock.images)
    run.progress.say(f"{run.folder.path.name}: continues from {checkpoint.name} ({clock.images:,} images)")
    return clock
