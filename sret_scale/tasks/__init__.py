"""What a run learns: the seam between the machine, which knows depth, memory and ranks, and its inputs and losses."""

from sret_scale.config.run_config import RunConfig
from sret_scale.distill import AnyTeacher, FeatureMatch
from sret_scale.model import TextConfig
from sret_scale.tasks.classification import Classification
from sret_scale.tasks.grid import Grid
from sret_scale.tasks.language import Language
from sret_scale.tasks.task import Task
from sret_scale.tasks.translation import Translation


def task_of(config: RunConfig, *, teacher: AnyTeacher | None = None, features: FeatureMatch | None = None) -> Task:
    """The task that a configuration names, with its teacher. ValueError where the rest does not fit it."""
    if config.task == "language":
        return Language(config)
    if config.task == "translation":
        return Translation(config)
    if isinstance(config.model, TextConfig):
        kind = config.model.kind
        raise ValueError(f"task={config.task} is of images: set task={kind} for a model of kind {kind!r}")
    if config.task == "grid":
        return Grid(config)
    if config.model.head == "tokens":
        raise ValueError("model.head=tokens labels every token: set task=grid, or model.head=classes")
    return Classification(config, teacher=teacher, features=features)
