"""Reads a finished or running run back: its configuration and a model with the weights of its newest checkpoint."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data_pipelines.checked_files import parse_checked, read_bounded
from data_pipelines.image.preprocessing import Preprocessing
from data_pipelines.labels.store import LabelStore
from data_pipelines.remote.shard_sets import open_data, open_training_data
from data_pipelines.shards.classes import check_same_classes, renumbered
from data_pipelines.shards.index import ShardSet
from data_pipelines.sources.listing import are_class_names
from data_pipelines.stream.loader import check_views
from data_pipelines.text.tokens import tokens_of, tokens_sha256
from sret_scale.config.run_config import ModelConfig, RunConfig, build, differences_of, from_yaml, to_plain
from sret_scale.config.timm_config import TimmConfig
from sret_scale.distill import open_matching_labels
from sret_scale.distill.spec import parse_teacher
from sret_scale.model import SReT, SReTConfig, StackModel, TextConfig
from sret_scale.model.vision.carry_weights import adapted_state
from sret_scale.model.vision.official import from_published
from sret_scale.model.vision.weight_files import load_model as load_native
from sret_scale.model.vision.weight_files import load_published, read_metadata
from sret_scale.runs.checkpoint import list_checkpoints, newest_valid, read_state, read_tensors, verify_checkpoint
from sret_scale.runs.run_folder import RunFolder
from sret_scale.tasks.translation import check_fits

WeightsKind = Literal["raw", "ema", "best"]
"""Trained, their moving average, or whichever of them an evaluation of the run found best so far."""


def load_config(run: Path) -> RunConfig:
    """The configuration of a run folder; FileNotFoundError saying what was looked for."""
    file = RunFolder(run).config
    if not file.exists():
        raise FileNotFoundError(f"{run} is not a run folder: it has no config.yaml; give the folder that `train` made")
    config = from_yaml(file)

    def found(location: str) -> str:
        if ":" in location.partition("/")[0] or Path(location).exists():
            return location
        # Version 0.1.0 kept what was typed: relative to where the run was started, which is above it as a rule.
        return next((str(above / location) for above in run.resolve().parents if (above / location).exists()), location)

    data = config.data
    train, test, *mixture = map(found, (data.train_folder, data.test_folder, *data.mixture_folders))
    data = replace(data, train_folder=train, test_folder=test, mixture_folders=tuple(mixture))
    if (tokens := RunFolder(run).tokens).exists():
        data = replace(data, tokens=str(tokens))
    return replace(config, data=data)


def load_class_names(source: Path) -> list[str] | None:
    """What a run, a checkpoint or a native file calls its classes, in their order; None where nobody knows.

    The folder of a run of version 0.1.0 does not say: they are those of its training shards, where these are there.
    """
    if not source.is_dir() or _is_checkpoint(source):
        return load_facts(source).get("class_names")
    folder, config = RunFolder(source), load_config(source)
    checkpoints = list_checkpoints(folder.checkpoints)
    if folder.classes.exists():
        return _parse_class_names(read_bounded(folder.classes), folder.classes, config.model.num_classes)
    if checkpoints and "class_names" in (state := read_state(checkpoints[0])):
        return _parse_class_names(json.dumps(state["class_names"]), checkpoints[0], config.model.num_classes)
    try:
        names = open_training_data(config.data).class_names
    except (OSError, ValueError):
        # What a run was trained on may be gone, moved or damaged: what it learned is still of use.
        return None
    return names if len(names) == config.model.num_classes else None


def _parse_class_names(text: str | bytes, where: Path, number: int | None = None) -> list[str]:
    names: Any = parse_checked(text.encode() if isinstance(text, str) else text, object, where)
    if not are_class_names(names) or len(names) != (number or len(names)):
        raise ValueError(f"{where}: expected a list of {number or ''} class names, none empty and none twice")
    return list(names)


def facts_of(config: RunConfig, class_names: list[str] | None) -> dict[str, Any]:
    """What goes with a run's weights into every file that holds them, as for JSON; names only where they are known."""
    named = {"task": config.task} if class_names is None else {"task": config.task, "class_names": class_names}
    if isinstance(config.model, TextConfig):
        return {**named, "tokens_sha256": tokens_sha256(config.data.tokens)}
    preprocessing = Preprocessing(
        resize=round(config.model.image_size / config.data.eval_crop_rate),
        crop=config.model.image_size,
        interpolation=config.data.interpolation,
        mean=config.train.image_mean,
        std=config.train.image_std,
    )
    return {**named, "preprocessing": asdict(preprocessing)}


def load_facts(source: Path) -> dict[str, Any]:
    """The same of a run's folder, one of its checkpoints or a native file, checked; without what an old one lacks."""
    if source.is_dir() and not _is_checkpoint(source):
        return facts_of(load_config(source), load_class_names(source))
    if source.is_dir():
        said = {name: json.dumps(value) for name, value in read_state(source).items()}
    else:
        said = read_metadata(source)
    facts: dict[str, Any] = {}
    if said.get("class_names", "null") != "null":
        facts["class_names"] = _parse_class_names(said["class_names"], source)
    if "tokens_sha256" in said:
        facts["tokens_sha256"] = parse_checked(said["tokens_sha256"].encode(), object, f"{source}: tokens_sha256")
    if "preprocessing" in said:
        where = f"{source}: preprocessing"
        facts["preprocessing"] = asdict(parse_checked(said["preprocessing"].encode(), Preprocessing, where))
        facts["task"] = "grid" if said.get("task", "").strip('"') == "grid" else "classification"
    return facts


def check_tokens(known: Mapping[str, Any], tokens: str | None, where: Path) -> None:
    """ValueError where weights were learned from other tokens than those of a file (None: bytes). Old ones say nothing.

    known: `tokens_sha256` of the weights, as a run, a checkpoint or a native file says it.
    """
    if "tokens_sha256" in known and known["tokens_sha256"] != tokens_sha256(tokens):
        raise ValueError(
            f"data.tokens={tokens or 'null, bytes'}: other tokens than {where} was trained with: choose another --run, "
            f"or give the file whose SHA-256 is {known['tokens_sha256'] or 'none, null'}"
        )


def _is_checkpoint(source: Path) -> bool:
    return (source / "state.json").exists()


def open_test_data(config: RunConfig, training: ShardSet) -> ShardSet:
    """The test set of a run with the classes of its training set. ValueError for one with others."""
    test = open_data(config.data.test_folder, config.data)
    return renumbered(test, training.class_names, owner=f"the train shards {training.folder}")


def check_text(shards: ShardSet, config: RunConfig) -> None:
    """ValueError for a set of text that the run's task or model cannot read, or one of images for a task of text."""
    if not shards.is_text and config.task not in ("language", "translation"):
        return
    context = config.model.sample_size.get("context")
    check_views(shards, config.data, 0, context)
    if shards.is_pairs != (config.task == "translation"):
        kind = "pairs" if shards.is_pairs else "windows"
        raise ValueError(f"{shards.folder}: shards of {kind} are not for task={config.task}")
    if shards.is_pairs and context is not None:
        check_fits(shards, tokens_of(config.data.tokens), context)


def open_labels_of(config: RunConfig, folder: Path, shards: ShardSet) -> LabelStore:
    """The stored labels of a run, unread. ValueError or OSError where they are not of its training shards and views."""
    data, augment, run_seed = config.data, config.augment, config.train.seed
    return open_matching_labels(folder, config.distill, shards=shards, data=data, augment=augment, run_seed=run_seed)


def check_teacher_classes(spec: str, class_names: Sequence[str]) -> None:
    """Raise ValueError where a run that teaches has learned other classes than those of the data."""
    for part in parse_teacher(spec):
        names = load_class_names(Path(part.value)) if part.kind == "run" else None
        if names is not None:
            check_same_classes(names, class_names, where=f"teacher {part.text}", owner="the data")


def load_model(
    run: Path, weights: WeightsKind | None, report: Callable[[str], None]
) -> tuple[StackModel, WeightsKind, int]:
    """(model in eval mode on the CPU, which weights it has, its step); `None` takes the EMA where one is kept."""
    config, folder = load_config(run), RunFolder(run)
    if weights == "best":
        if not folder.best.exists():
            raise FileNotFoundError(f"{folder.best} is not there: no evaluation of {run} has kept its weights yet")
        model = load_native(folder.best)
        check_architecture(config.model, to_plain(model.config), str(folder.best))
        check_tokens(load_facts(folder.best), config.data.tokens, folder.best)
        said = read_metadata(folder.best).get("step", "")
        return model, weights, parse_checked(said.encode(), int, f"{folder.best}: step")
    checkpoint = newest_valid(folder.checkpoints, report)
    if checkpoint is None:
        raise FileNotFoundError(f"{run} has no checkpoint yet: train it first")
    state = read_state(checkpoint)
    check_architecture(config.model, state["model"], str(checkpoint))
    check_tokens(state, config.data.tokens, checkpoint)
    return load_checkpoint(checkpoint, weights)


def load_checkpoint(checkpoint: Path, weights: WeightsKind | None) -> tuple[StackModel, WeightsKind, int]:
    """The same of one checkpoint, which is taken as whole, and has no best weights."""
    if weights == "best":
        raise ValueError(f"{checkpoint} is a checkpoint: the best weights are in the folder of its run")
    state = read_state(checkpoint)
    tensors = read_tensors(checkpoint, "ema") if weights != "raw" else {}
    if tensors:
        tensors |= read_tensors(checkpoint, "ema_statistics")
    if weights == "ema" and not tensors:
        raise ValueError(
            f"{checkpoint} holds no moving average: use the raw weights, or train with optim.ema_horizon_images"
        )
    kind: WeightsKind = "ema" if tensors else "raw"
    model = build(ModelConfig, state["model"], "model").build()
    model.load_state_dict(tensors or read_tensors(checkpoint, "weights"))
    return model.eval(), kind, int(state["step"])


def load_trained(source: Path, weights: WeightsKind | None = None) -> StackModel:
    """The model of a run's folder, a checkpoint, or a native file, which has one kind; in eval mode on the CPU."""
    if not source.is_dir():
        return load_native(source)
    if _is_checkpoint(source):
        verify_checkpoint(source)
        return load_checkpoint(source, weights)[0]
    return load_model(source, weights, print)[0]


# What may differ between a model and the weights that it starts from: none of these has weights of its own, besides
# the position tensor, which is interpolated.
_FREE_IN_FINE_TUNING = ("image_size", "drop_path", "dropout", "permutation", "permutation_seed", "group_fit", "groups")


def initial_state(source: str, config: ModelConfig) -> dict[str, Tensor]:
    """The state dict for `config` of `run:FOLDER` or of a file, its position tensor interpolated to the image size.

    A file ending in .safetensors is native, any other in the published layout (no code in it is run); for a backbone of
    timm, the weights of its untied network, of whose blocks the means are taken. Raises ValueError or OSError where
    there is none, or where it is of another architecture.
    """
    kind, _, path = source.partition(":")
    try:
        if kind == "run" and path:
            model = load_model(Path(path), None, print)[0]
        elif isinstance(config, TimmConfig):
            model = config.build(Path(source))
        elif source.endswith(".safetensors"):
            model = load_native(Path(source))
        elif isinstance(config, SReTConfig):
            model = published_model(Path(source), config)
        else:
            raise ValueError(f"train.initial_weights={source}: expected run:FOLDER, or a file of safetensors")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"train.initial_weights={source}: {error}") from error
    # The positions of other models are not ours to interpolate.
    free = tuple(name for name in _FREE_IN_FINE_TUNING if name != "image_size" or config.kind == "vision")
    if model.config.kind != config.kind:
        raise ValueError(f"train.initial_weights={source}: of kind {model.config.kind}, the model is {config.kind}")
    changed = [
        line
        for line in differences_of(to_plain(model.config), to_plain(config))
        if not any(name in line.partition(":")[0].split(".") for name in free)
    ]
    if changed:
        raise ValueError(
            f"train.initial_weights={source}: of another architecture: {'; '.join(changed[:4])} (there -> model); "
            f"only {', '.join(free)} may differ"
        )
    return adapted_state(model.state_dict(), model.config, config, config.build().state_dict())


def published_model(file: Path, config: SReTConfig) -> SReT:
    """The published weights of a file in a model of `config`, at the image size that they were trained at."""
    published, _ = load_published(file)
    side = published["pos_embed"].shape[-1] if "pos_embed" in published else config.grids[0]
    image_size = side * config.image_size // config.grids[0]
    before = replace(config, image_size=image_size, group_fit="nearest")
    model = SReT(before)
    try:
        model.load_state_dict(from_published(before, published))
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"train.initial_weights={file}: does not fit the model: {reason}") from error
    return model


def load_teacher_run(run: Path) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    """(model, mean, std, image size) of a run, as sret_scale.distill takes a teacher."""
    config = load_config(run)
    model, _, _ = load_model(run, None, print)
    return model, config.train.image_mean, config.train.image_std, config.images.image_size


def untrained_teacher_run(run: Path) -> tuple[StackModel, int]:
    """(model without weights on the meta device, image size) of a run folder."""
    config = load_config(run)
    with torch.device("meta"):
        return config.model.build(), config.images.image_size


def check_architecture(expected: ModelConfig, saved: object, where: str) -> None:
    """Raise ValueError, naming what differs, unless a checkpoint's saved model config is `expected`."""
    found = build(ModelConfig, saved, "model")
    changed = differences_of(to_plain(found), to_plain(expected))
    if changed:
        raise ValueError(
            f"{where} was made by another architecture: {'; '.join(changed[:4])} (checkpoint -> configuration); "
            "use another --run, or the configuration of the checkpoint"
        )
