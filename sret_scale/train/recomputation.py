"""Sets a model's recomputation as a run's configuration asks, with room for the teacher that lives beside it."""

from sret_scale.config.ds_config import load_ds_config, precision_of, zero_stage_of
from sret_scale.config.run_config import RunConfig
from sret_scale.config.step_depth import deepest_plan
from sret_scale.distill.footprint import TeacherBytes, teacher_bytes
from sret_scale.memory import Prepared, prepare_memory
from sret_scale.model import StackModel
from sret_scale.train.load_run import untrained_teacher_run


def set_up_recomputation(model: StackModel, config: RunConfig, world_size: int) -> Prepared:
    """Applies `config.memory` to `model`.

    Raises ValueError where a budget cannot be kept, before anything is set.
    """
    ds_config = load_ds_config(config.engine.ds_config)
    return prepare_memory(
        model,
        config.memory,
        micro_batch_size=config.train.micro_batch_size,
        precision=precision_of(ds_config),
        world_size=world_size,
        zero_stage=zero_stage_of(ds_config),
        reserved_bytes=bytes_beside(config, world_size) if config.memory.budget_bytes is not None else 0,
        depth=deepest_plan(config.depth, config.model),
    )


def bytes_beside(config: RunConfig, world_size: int) -> int:
    """What the live teacher takes of a rank. `auto` is counted as fp32, the larger of what it may mean."""
    distill = config.distill
    if distill.teacher is None:
        return 0
    found: TeacherBytes = teacher_bytes(
        distill.teacher,
        num_classes=config.model.num_classes,
        micro_batch_size=distill.teacher_micro_batch_size or config.train.micro_batch_size,
        precision=distill.teacher_precision,
        untrained_run=untrained_teacher_run,
    )
    is_cut = distill.teacher_placement == "sharded"
    return found.forward + (-(-found.weights // world_size) if is_cut else found.weights)
