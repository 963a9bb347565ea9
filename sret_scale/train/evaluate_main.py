"""The evaluation of a run on a shard set: what every rank does of it (`sret_scale.launch.requests`)."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data_pipelines.remote.shard_sets import open_data
from data_pipelines.shards.classes import classes_without_samples, renumbered
from data_pipelines.shards.index import ShardSet
from data_pipelines.stream.loader import Batch
from sret_scale.config.run_config import RunConfig
from sret_scale.config.step_depth import proportional_loops
from sret_scale.model import StackModel
from sret_scale.model.vision.carry_weights import new_projections
from sret_scale.model.vision.sret import as_sret
from sret_scale.train.distributed import Ranks, from_all_ranks, ranks_from_environment
from sret_scale.train.evaluate import AfterBatch, Evaluation, evaluate
from sret_scale.train.load_run import check_text, load_class_names, load_config, load_model


class Measure(Protocol):
    """Measures a model on one shard set; `after_batch` hears each batch with its scores."""

    def __call__(self, one: nn.Module, after_batch: AfterBatch = ..., /) -> Evaluation: ...


def evaluate_run(
    run: Path,
    shards: str | None,
    weights: Any,
    ranks: Ranks,
    *,
    loops: int | None = None,
    image_size: int | None = None,
    has_answers: bool = False,
) -> dict[str, Any]:
    """The accuracy of a run's newest checkpoint on `shards` (None: its test set), as a JSON object; on every rank.

    loops: of the stage with the most, the others in proportion; None for those that the run has, as with image_size.
    has_answers: add (index, predicted class, its probability, that of the sample's class) for every sample.
    """
    opened, config = open_shards(run, shards, image_size)
    model, kind, step = load_model_of(run, weights, loops, image_size)
    if has_answers:
        require_classes(config, run)
    rows: list[Tensor] = []

    def collect(batch: Batch, scores_BC: Tensor) -> None:
        best, own_B1 = (
            scores_BC.softmax(1).max(1),
            scores_BC.softmax(1).gather(1, batch.labels[:, None].to(ranks.device)),
        )
        answer_4B = (batch.indices.to(ranks.device), best.indices, best.values, own_B1[:, 0])
        rows.append(torch.stack([column.double() for column in answer_4B], 1).cpu()[batch.valid])

    model = model.to(ranks.device)
    result = evaluate(model, opened, config, ranks, after_batch=collect if has_answers else lambda batch, scores: None)
    assert result is not None, "nothing here asks it to stop"
    answers = from_all_ranks(torch.cat(rows).tolist()) if has_answers else []
    return {
        "run": str(run),
        "shards": str(opened.folder),
        "step": step,
        "weights": kind,
        "loops": [stage.num_loops for stage in model.config.stages],
        "applications": model.config.num_applications,
        **result.to_json(),
        "classes_without_samples": classes_without_samples(opened),
        "untrained_projections": len(new_projections(config.model, model.config)),
        **({"answers": sorted(itertools.chain(*answers))} if has_answers else {}),
    }


def evaluator_of(run: Path, shards: str | None, weights: Any, loops: int | None) -> tuple[StackModel, Measure]:
    """(the run's model, what measures a model on the run's test shards or `shards`); for every rank that there is."""
    ranks = ranks_from_environment()
    opened, config = open_shards(run, shards)
    require_classes(config, run)
    model, _, _ = load_model_of(run, weights, loops)

    def measure(one: nn.Module, after_batch: AfterBatch = lambda batch, scores: None) -> Evaluation:
        result = evaluate(one.to(ranks.device), opened, config, ranks, after_batch=after_batch)
        assert result is not None, "nothing here asks it to stop"
        return result

    return model, measure


def open_shards(run: Path, shards: str | None, image_size: int | None = None) -> tuple[ShardSet, RunConfig]:
    """`shards`, or the run's test set, its labels those of the run's classes, and the run's configuration, at another
    image size where one is given.

    ValueError for other classes; of a run whose class names nobody knows any more, for another number of them.
    """
    config = load_config(run)
    if image_size is not None:
        config = replace(config, model=replace(config.vision, image_size=image_size))
    opened = open_data(shards or config.data.test_folder, config.data)
    check_text(opened, config)
    class_names = load_class_names(run)
    if class_names is not None:
        return renumbered(opened, class_names, owner=f"the run {run}"), config
    if opened.num_classes != config.model.num_classes:
        raise ValueError(
            f"{opened.folder} has {opened.num_classes} classes, the model of {run} has {config.model.num_classes}: "
            "give --shards of these classes"
        )
    return opened, config


def require_classes(config: RunConfig, run: Path) -> None:
    """ValueError for the run of another task, where something is asked of classes."""
    if config.task != "classification":
        raise ValueError(f"{run} has task={config.task}, and this is asked of classes of images")


def load_model_of(
    run: Path, weights: Any, loops: int | None, image_size: int | None = None
) -> tuple[StackModel, str, int]:
    """(model, which weights, step) of a run's newest checkpoint, at another depth and image size where one is given."""
    model, kind, step = load_model(run, weights, print)
    if image_size is not None:
        model = as_sret(model, "another image size").with_image_size(image_size)
    if loops is not None:
        model = model.with_loops(proportional_loops(model.config, loops))
    return model, kind, step


def evaluation(request: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """`evaluate_run` of what a request names."""
    return evaluate_run(Path(request.pop("run")), request.pop("shards"), request.pop("weights"), ranks, **request)
