"""A run's parts: model, engine, data, teacher and logs, built from its configuration on every rank."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from data_pipelines.labels.store import check_files
from data_pipelines.remote.shard_sets import open_training_data
from data_pipelines.shards.index import ShardSet
from data_pipelines.stream.loader import LoaderState, TrainLoader
from sret_scale.config.ds_config import load_ds_config, precision_of
from sret_scale.config.run_config import RunConfig, grad_accum_steps
from sret_scale.distill import (
    AnyTeacher,
    FeatureMatch,
    OnlineTeacher,
    StoredTeacher,
    Teacher,
    build_teacher,
    stored_labels,
)
from sret_scale.memory import Prepared
from sret_scale.model import StackModel, Stage
from sret_scale.model.text.token_model import TokenModel
from sret_scale.model.vision.stem import SyncBatchNorm
from sret_scale.runs.run_folder import RunFolder
from sret_scale.tasks import task_of
from sret_scale.tasks.task import Task
from sret_scale.train.checkpoint_writer import CheckpointWriter
from sret_scale.train.distributed import Ranks, differentiable_sum
from sret_scale.train.engine.apex_door import choose_kernels
from sret_scale.train.engine.compilation import Compiled, compile_model
from sret_scale.train.engine.engine import Engine, shard_frozen
from sret_scale.train.load_run import load_teacher_run, open_labels_of, open_test_data
from sret_scale.train.optim import WeightAverage, build_optimizer
from sret_scale.train.progress import RunProgress
from sret_scale.train.recomputation import set_up_recomputation
from sret_scale.train.telemetry import Telemetry, telemetry_of
from sret_scale.train.telemetry.trackers import MetricsLog, open_metrics
from sret_scale.train.watchdog import Phase, Watchdog


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How far a run has come. `time_s` adds up all its starts."""

    step: int = 0
    samples: int = 0
    time_s: float = 0.0
    is_evaluated: bool = True
    """False when a signal came before an evaluation that was due here."""
    skipped_steps: int = 0
    """Updates in a row, up to here, that were left out."""
    loader: LoaderState = field(default_factory=LoaderState)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run that the training loop and its saves share."""

    config: RunConfig
    folder: RunFolder
    ranks: Ranks
    loader: TrainLoader
    train_shards: ShardSet
    test_shards: ShardSet
    task: Task
    engine: Engine
    compiled: Compiled | None
    average: WeightAverage | None
    teacher_identity: dict[str, Any] | None
    memory: Prepared
    eval_model: StackModel
    """A second one: weights that are swapped in and out of the trained one could stay swapped, and ZeRO cuts them."""
    metrics: MetricsLog
    telemetry: Telemetry | None
    progress: RunProgress
    watchdog: Watchdog
    writer: CheckpointWriter

    @contextlib.contextmanager
    def phase(self, name: Phase, clock: Clock) -> Iterator[None]:
        """Inside the `with`, the watchdog knows what this rank does; behind it, that it has come further."""
        self.watchdog.progress(clock.step, name)
        yield
        self.watchdog.progress(clock.step, "computing")


def set_up(config: RunConfig, folder: RunFolder, ranks: Ranks, stack: contextlib.ExitStack) -> Run:
    """Model, engine, data, teacher and logs; the initial weights are a function of the seed alone."""
    watchdog = Watchdog(
        folder.path, rank=ranks.rank, world_size=ranks.world_size, timeout_s=config.train.hang_timeout_s
    )
    stack.enter_context(watchdog)
    accumulation = grad_accum_steps(config.train, ranks.world_size)
    shards = open_training_data(config.data)
    loader = TrainLoader(
        shards,
        dataclasses.replace(config.data, quarantine_file=config.data.quarantine_file or str(folder.quarantine)),
        **config.model.sample_size,
        seed=config.train.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        micro_batch_size=config.train.micro_batch_size,
        grad_accum_steps=accumulation,
    )
    engine, memory = set_up_engine(config, ranks, accumulation)
    horizon = config.optim.ema_horizon_images
    teacher = set_up_teacher(config, ranks, shards)
    task = task_of(config, teacher=teacher, features=match_features(config, engine.model, teacher))
    metrics = open_metrics(folder.metrics, config.train.trackers, stack) if ranks.is_main else MetricsLog()
    return Run(
        config=config,
        folder=folder,
        ranks=ranks,
        loader=loader,
        train_shards=shards,
        test_shards=open_test_data(config, shards),
        task=task,
        engine=engine,
        compiled=compile_model(engine.model, config, ranks),
        average=WeightAverage(engine.local_weights(), horizon) if horizon else None,
        teacher_identity=identity_of(teacher, config),
        memory=memory,
        eval_model=config.model.build().to(ranks.device).eval(),
        metrics=metrics,
        telemetry=set_up_telemetry(config, engine, ranks),
        watchdog=watchdog,
        writer=stack.enter_context(CheckpointWriter(folder.checkpoints, ranks, keep=config.train.keep_checkpoints)),
        progress=stack.enter_context(
            RunProgress(
                folder.path.name, total_samples=config.train.total_images, unit=task.unit, is_shown=ranks.is_main
            )
        ),
    )


def set_up_telemetry(config: RunConfig, engine: Engine, ranks: Ranks) -> Telemetry | None:
    """What looks at the health of the model's depth on rank 0."""
    precision = precision_of(load_ds_config(config.engine.ds_config))
    assert isinstance(engine.model, StackModel)
    return telemetry_of(engine.model, config.telemetry, precision, is_main=ranks.is_main, zero_stage=engine.zero_stage)


def set_up_engine(config: RunConfig, ranks: Ranks, accumulation: int) -> tuple[Engine, Prepared]:
    """(the model under DeepSpeed, with its optimiser and recomputation; what is said of its memory)"""
    torch.manual_seed(config.train.seed)
    model = as_trained(config.model.build().to(ranks.device), config)
    ds_config = load_ds_config(config.engine.ds_config)
    memory = set_up_recomputation(model, config, ranks.world_size)
    optimizer = build_optimizer(model, model.parameter_tags(), config.optim)
    optimizer.apex, kernels = choose_kernels(ranks.device)
    if ranks.is_main and optimizer.apex:
        print(kernels, flush=True)
    engine = Engine(
        model,
        optimizer,
        ds_config,
        micro_batch_size=config.train.micro_batch_size,
        grad_accum_steps=accumulation,
        z3_leaf_modules=(Stage,),
    )
    return engine, memory


def as_trained(model: StackModel, config: RunConfig) -> StackModel:
    """`model`, its synchronised BatchNorms connected over the ranks; one of text, which makes its loss, smooths it."""
    if isinstance(model, TokenModel):
        model.label_smoothing = config.distill.label_smoothing
    for module in model.modules():
        if isinstance(module, SyncBatchNorm):
            module.all_reduce = differentiable_sum
    return model


def set_up_teacher(config: RunConfig, ranks: Ranks, shards: ShardSet) -> AnyTeacher | None:
    """The teacher of the configuration, live or stored, outside everything that is trained, averaged or saved."""
    if config.distill.teacher is None:
        return None
    if folder := stored_labels(config.distill.teacher):
        store = open_labels_of(config, folder, shards)
        # Every rank reads its share of the files once.
        check_files(folder, store.plan, rank=ranks.rank, world_size=ranks.world_size)
        return StoredTeacher(store)
    return live_teacher(config, ranks.device)


def live_teacher(config: RunConfig, device: torch.device) -> Teacher:
    """The network that the configuration names, on a device."""
    assert config.distill.teacher is not None
    return build_teacher(
        config.distill.teacher,
        num_classes=config.model.num_classes,
        device=device,
        load_run=load_teacher_run,
        micro_batch_size=config.distill.teacher_micro_batch_size,
        precision=config.distill.teacher_precision,
        compiled=config.distill.teacher_compile,
        shard=shard_frozen if config.distill.teacher_placement == "sharded" else None,
    )


def match_features(config: RunConfig, student: torch.nn.Module, teacher: AnyTeacher | None) -> FeatureMatch | None:
    """What compares the features of student and teacher, where the configuration asks for it."""
    if not config.distill.matches_features:
        return None
    assert isinstance(teacher, OnlineTeacher)
    return FeatureMatch(student, teacher.module, num_classes=config.model.num_classes, teacher_name=teacher.spec)


def identity_of(teacher: AnyTeacher | None, config: RunConfig) -> dict[str, Any] | None:
    """What decides on a live teacher's answers, its weights' hash included. A store of labels proves itself."""
    if teacher is None or isinstance(teacher, StoredTeacher):
        return None
    if config.distill.teacher_placement == "sharded":
        return {"spec": config.distill.teacher}
    return teacher.describe()
