"""The stages of a model with their type, which the list of modules that holds them does not know."""

from typing import cast

from sret_scale.model import SReT
from sret_scale.model.stage import Stage


def stages_of(model: SReT) -> list[Stage]:
    return [cast(Stage, stage) for stage in model.stages]
