"""Backbones of timm small enough for a test, as the models of runs; images of 28 pixels, 10 classes."""

import torch

from sret_scale.config.timm_config import TimmConfig
from sret_scale.model import StackConfig, StackModel, StageConfig

TINY_VIT = TimmConfig(
    name="VisionTransformer",
    arguments=("patch_size=7", "embed_dim=16", "depth=4", "num_heads=2"),
    stages=(StageConfig(width=16, num_heads=2, num_blocks=2, num_loops=3, branch_scheme="published"),),
    image_size=28,
    num_classes=10,
    drop_path=0.3,
    step_size=0.5,
)
TINY_MIXER = TimmConfig(
    name="MlpMixer",
    arguments=("patch_size=7", "embed_dim=16", "num_blocks=4"),
    stages=(
        StageConfig(
            width=16,
            num_heads=1,
            num_blocks=2,
            num_loops=4,
            loop_order="model",
            projections="per_block",
            conditioning="norm_by_depth",
        ),
    ),
    image_size=28,
    num_classes=10,
    drop_path=0.3,
)
BACKBONES = {"vit": TINY_VIT, "mixer": TINY_MIXER}


def drawn(config: StackConfig, seed: int = 0) -> StackModel:
    """The model, none of its weights zero, as those of heads and of conditioning are at first."""
    torch.manual_seed(seed)
    model = config.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
