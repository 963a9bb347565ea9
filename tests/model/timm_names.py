"""Five recursive backbones among timm's own modules, so that timm's test suite takes them for models of its own.

A plugin of pytest (`-p timm_names`), for test_model_timm_suite.py alone.
"""

import sys
from typing import Any

from torch import nn

from sret_scale.timm import import_timm
from sret_scale.timm.recursive import recursive

timm = import_timm()
BASES = {
    "vit_tiny_recursive": ("vision_transformer", "vit_tiny_patch16_224", 4),
    "deit_tiny_recursive": ("deit", "deit_tiny_patch16_224", 6),
    "mixer_s32_recursive": ("mlp_mixer", "mixer_s32_224", 2),
    "resmlp_12_recursive": ("mlp_mixer", "resmlp_12_224", 3),
    "cait_xxs24_recursive": ("cait", "cait_xxs24_224", 8),
}


def register(name: str, module: str, base: str, num_blocks: int) -> None:
    def create(pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
        return recursive(pretrained_cfg=base, num_blocks=num_blocks, **kwargs)

    owner = sys.modules[f"timm.models.{module}"]
    create.__name__, create.__module__ = name, owner.__name__
    owner.default_cfgs[name] = owner.default_cfgs[base]
    timm.models.register_model(create)


for _name, _base in BASES.items():
    register(_name, *_base)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Without a name behind the dot `recursive` is refused: no model to test."""
    items[:] = [item for item in items if not item.name.endswith("-recursive]")]
