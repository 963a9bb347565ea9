"""Everything that is checked before a run's processes start, and their start."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from data_pipelines.atomic_files import write_whole
from data_pipelines.image.native import library
from data_pipelines.remote.shard_sets import open_data, open_training_data
from data_pipelines.shards.classes import check_same_classes
from data_pipelines.stream.loader import check_node_cache
from data_pipelines.text.tokens import tokens_sha256
from sret_scale.config.ds_config import load_ds_config, zero_stage_of
from sret_scale.config.run_config import RunConfig, from_yaml, grad_accum_steps, split_differences, to_yaml, whole_paths
from sret_scale.config.step_depth import check_depth
from sret_scale.distill.spec import parse_teacher
from sret_scale.launch.dry_run import describe_run
from sret_scale.launch.hostfile import Host
from sret_scale.launch.launcher import launch
from sret_scale.launch.nodes import choose_nodes
from sret_scale.model import TextConfig, describe
from sret_scale.runs.checkpoint import list_checkpoints, read_state
from sret_scale.runs.run_folder import EXIT_FINISHED, RunFolder, environment, read_status, write_json
from sret_scale.tasks import task_of
from sret_scale.train import load_run
from sret_scale.train.engine.compilation import check_compile
from sret_scale.train.optim import check_optimizer, learning_rate
from sret_scale.train.recomputation import set_up_recomputation
from sret_scale.train.telemetry.trackers import tracker_of


def start_run(
    config: RunConfig,
    path: Path,
    *,
    num_ranks: int | None = None,
    hosts: Sequence[Host] = (),
    is_fresh: bool = False,
    dry_run: bool = False,
) -> int:
    """Check `config`, make or continue the run folder, start the ranks, wait; returns the run's exit status.

    Raises ValueError or OSError, before anything is started or written, for what can be known to be wrong.
    """
    config = whole_paths(config)
    place = choose_nodes(num_ranks=num_ranks, hosts=hosts, is_preview=dry_run)
    check_start(config, path, place.ranks_of_nodes, is_fresh=is_fresh)
    folder = RunFolder(path)
    if dry_run:
        if is_fresh:
            check_removable(folder)
        else:
            print_all(check_configuration(folder, config))
            if is_finished(folder, config.train.total_images):
                print(f"{path} is finished: a start would do nothing; --fresh runs it again")
        print_all(describe_run(config, place))
        launch(path, folder.config, num_ranks=num_ranks, hosts=hosts, dry_run=True)
        print(f"config:\n{to_yaml(config).rstrip()}")
        return 0
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot make the run folder {path}: {error.strerror}; choose another --run"
        ) from error
    # Held until the ranks have ended: nobody else may look at the folder between this check and rank 0's own lock.
    with folder.locked("launch.lock"):
        with folder.locked():
            if is_fresh:
                remove_results(folder)
            print_all(check_configuration(folder, config))
        if is_finished(folder, config.train.total_images):
            print(f"{path} is finished: {config.train.total_images:,} images; --fresh runs it again")
            return EXIT_FINISHED
        place.check_reachable(path)
        write_description(folder, config, sum(place.ranks_of_nodes))
        library.build_at_first_use()
        return launch(path, folder.config, num_ranks=num_ranks, hosts=hosts)


def print_all(lines: Iterable[str]) -> None:
    """One after the other, as they come."""
    for line in lines:
        print(line)


def check_start(config: RunConfig, path: Path, ranks_of_nodes: Sequence[int], *, is_fresh: bool = False) -> None:
    """Raise ValueError or OSError for what can be known to be wrong with a run of so many ranks on each node."""
    check_run(config, sum(ranks_of_nodes))
    check_cache(config, ranks_of_nodes)
    # A run that goes on has its own weights; those that it began with may be gone by then.
    if config.train.initial_weights and (is_fresh or not RunFolder(path).checkpoints.exists()):
        load_run.initial_state(config.train.initial_weights, config.model)
        if isinstance(config.model, TextConfig):
            source = Path(config.train.initial_weights.removeprefix("run:"))
            load_run.check_tokens(load_run.load_facts(source), config.data.tokens, source)


def check_run(config: RunConfig, world_size: int) -> None:
    """Raise ValueError or OSError where shards, classes, batch, memory, ds_config or teacher do not fit together."""
    train = config.train
    grad_accum_steps(train, world_size)
    zero_stage = zero_stage_of(load_ds_config(config.engine.ds_config))
    check_optimizer(config.optim, zero_stage)
    with torch.device("meta"):
        model = config.model.build()
    if config.memory.budget_bytes is not None:
        set_up_recomputation(model, config, world_size)
    check_depth(
        config.depth,
        config.model,
        schedule=config.memory.schedule,
        zero_stage=zero_stage,
        has_features=config.distill.matches_features,
    )
    task_of(config)
    check_compile(config)
    check_data(config, world_size)
    if train.total_images < train.global_batch_size:
        raise ValueError(
            f"train.total_images={train.total_images} is less than one global batch of {train.global_batch_size}"
        )
    if config.optim.warmup_images >= train.total_images:
        raise ValueError(
            f"optim.warmup_images={config.optim.warmup_images} leaves nothing of train.total_images="
            f"{train.total_images}: the rate would never reach its peak; set a shorter warm-up"
        )
    for name in train.trackers:
        tracker_of(name)
    check_teacher(config)


def check_data(config: RunConfig, world_size: int) -> None:
    """Raise ValueError unless the training set has the model's classes and enough samples, and the test set no others.

    A test set may lack classes.
    """
    shards = open_training_data(config.data)
    load_run.check_text(shards, config)
    if shards.is_text:
        load_run.check_text(open_data(config.data.test_folder, config.data), config)
    if shards.num_classes != config.model.num_classes:
        raise ValueError(
            f"the train shards {shards.folder} have {shards.num_classes} classes, the model has "
            f"{config.model.num_classes}: set model.num_classes={shards.num_classes}"
        )
    load_run.open_test_data(config, shards)
    if shards.num_samples < config.train.global_batch_size:
        raise ValueError(
            f"{shards.folder} has {shards.num_samples} samples, fewer than one global batch of "
            f"{config.train.global_batch_size} for {world_size} ranks: use fewer ranks or a smaller batch"
        )


def check_cache(config: RunConfig, ranks_of_nodes: Sequence[int]) -> None:
    """Raise ValueError where the shards that the ranks of a node fetch ahead do not fit its cache.

    Where nodes have different numbers of ranks, each rank checks its own part at its start.
    """
    if len(set(ranks_of_nodes)) == 1:
        check_node_cache(
            open_training_data(config.data),
            config.data,
            seed=config.train.seed,
            global_batch_size=config.train.global_batch_size,
            num_nodes=len(ranks_of_nodes),
        )


def check_teacher(config: RunConfig) -> None:
    """Raise ValueError or OSError for a teacher that cannot be, as far as is known without loading a network."""
    if config.distill.teacher is None:
        return
    for part in parse_teacher(config.distill.teacher):
        if part.kind == "run":
            check_teacher_run(Path(part.value))
        elif part.kind == "labels":
            load_run.open_labels_of(config, Path(part.value), open_training_data(config.data))
    load_run.check_teacher_classes(config.distill.teacher, open_training_data(config.data).class_names)


def check_teacher_run(path: Path) -> None:
    """Raise unless the folder holds a finished run: weights that still change would change what a student learns."""
    folder = RunFolder(path)
    if not folder.config.exists():
        raise FileNotFoundError(f"teacher run:{path}: {path} is not a run folder (no config.yaml)")
    if not is_finished(folder):
        raise ValueError(
            f"teacher run:{path}: expected a finished run, got state {read_status(folder).get('state')!r}: "
            "finish it with its own command first"
        )


def check_configuration(folder: RunFolder, config: RunConfig) -> list[str]:
    """What a continued run changes, in words; ValueError where the folder holds a run of another configuration."""
    if not folder.config.exists():
        return []
    if folder.classes.exists():
        shards = open_training_data(config.data)
        before = load_run.load_class_names(folder.path) or []
        check_same_classes(shards.class_names, before, where=str(shards.folder), owner=f"the run {folder.path}")
    known = {"tokens_sha256": tokens_sha256(folder.tokens if folder.tokens.exists() else None)}
    load_run.check_tokens(known, config.data.tokens, folder.path)
    old, seen, total_images = whole_paths(from_yaml(folder.config)), images_seen(folder), config.train.total_images
    is_same_length = old.train.total_images == total_images
    refused, allowed = split_differences(old, config, is_finished=is_same_length and is_finished(folder, total_images))
    if refused:
        raise ValueError(
            f"{folder.path} holds a run of another configuration: {'; '.join(refused[:5])}"
            f"{' ...' if len(refused) > 5 else ''} (there -> asked for): choose another --run, or add --fresh"
        )
    if not is_same_length and total_images <= seen:
        raise ValueError(
            f"{folder.path} has seen {seen:,} images: expected train.total_images above that, got {total_images:,}"
        )
    lines = [f"continues with {line}" for line in allowed]
    there, here = learning_rate(old, seen), learning_rate(config, seen)
    if seen and there != here:
        lines.append(f"at {seen:,} images the learning rate goes from {there:.3g} to {here:.3g}")
    return lines


def images_seen(folder: RunFolder) -> int:
    """The images behind the newest checkpoint; 0 without one."""
    checkpoints = list_checkpoints(folder.checkpoints)
    return int(read_state(checkpoints[0])["images"]) if checkpoints else 0


def write_description(folder: RunFolder, config: RunConfig, world_size: int) -> None:
    """What is computed, by what, and how large it is."""
    write_json(folder.classes, open_training_data(config.data).class_names)
    write_whole(folder.config, to_yaml(config))
    if config.data.tokens is not None:
        write_whole(folder.tokens, Path(config.data.tokens).read_bytes())
    write_json(folder.model, describe(config.model))
    write_json(folder.environment, environment(world_size))


def is_finished(folder: RunFolder, total_images: int = 0) -> bool:
    """True when the run of this folder came to its end, its last evaluation included, and that is not to be later."""
    if read_status(folder).get("state") != "finished":
        return False
    # A run whose checkpoints were removed cannot go on.
    return not list_checkpoints(folder.checkpoints) or images_seen(folder) >= total_images


def check_removable(folder: RunFolder) -> None:
    """Raise ValueError for a folder of other files: --fresh deletes runs alone."""
    files = folder.path.iterdir() if folder.path.exists() else ()
    if not folder.environment.exists() and any(file.name not in ("lock", "launch.lock") for file in files):
        raise ValueError(f"{folder.path} is not a run folder (no environment.json): --fresh deletes nothing there")


def remove_results(folder: RunFolder) -> None:
    """Delete what an earlier run left in the folder; other files stay."""
    check_removable(folder)
    for name in ("logs", "errors", "heartbeats", "tensorboard", "wandb"):
        shutil.rmtree(folder.path / name, ignore_errors=True)
    if folder.checkpoints.exists():
        shutil.rmtree(folder.checkpoints)
    for file in (
        folder.classes,
        folder.config,
        folder.model,
        folder.tokens,
        folder.best,
        folder.metrics,
        folder.status,
        folder.quarantine,
        folder.environment,
    ):
        file.unlink(missing_ok=True)
