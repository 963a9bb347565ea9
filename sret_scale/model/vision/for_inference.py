"""A model made ready for inference: BatchNorm folded into the stem's convolutions, branch coefficients into weights."""

import copy
from typing import cast

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sret_scale.model.layers import Block, LearnableResidual, NonLinearProjection
from sret_scale.model.stack import StackModel
from sret_scale.model.stage import Stage
from sret_scale.model.vision.sret import SReT


def folded(model: StackModel) -> StackModel:
    """A copy in evaluation mode that computes the same with fewer operations; it is not for training or saving.

    Of a model that is no SReT it is a copy alone.

    Its permutations become constants, as an exporter needs them; ValueError where the config draws new ones every time.
    """
    if model.config.permutation == "random":
        raise ValueError("permutation='random' draws anew in every pass and cannot be made constant; use 'fixed'")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if not isinstance(model, SReT):
        return model
    for index, norm in enumerate(model.stem.norms):
        if isinstance(norm, nn.BatchNorm2d):
            conv = model.stem.convs[index]
            assert isinstance(conv, nn.Conv2d)
            model.stem.convs[index] = fuse_conv_bn_eval(conv, norm)
            model.stem.norms[index] = nn.Identity()
    for index, grid in enumerate(model.config.grids):
        _fix_permutations(cast(Stage, model.stages[index]), grid * grid, model.position.device)
    for module in model.modules():
        if isinstance(module, Block):
            _fold(module.residual1, module.attention.out)
            _fold(module.residual2, module.feed_forward.fc2)
        elif isinstance(module, NonLinearProjection):
            _fold(module.residual, module.feed_forward.fc2)
    return model


def _fix_permutations(stage: Stage, num_tokens: int, device: torch.device) -> None:
    count = sum(slot.permuted for slot in stage.slots)
    table = stage.permutations(None, count, num_tokens, device)
    stage.permutations = lambda noise, count, num_tokens, device: table


@torch.no_grad()
def _fold(residual: LearnableResidual, layer: nn.Linear) -> None:
    assert residual.beta is not None
    gain_R = residual.beta * residual.multiplier
    layer.weight.mul_(gain_R[:, None])
    layer.bias.mul_(gain_R)
    residual.beta = None
