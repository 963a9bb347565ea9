"""Counts a model from its config alone: parameters, multiply-adds (MACs) and the three measures of depth.

Papers mix the measures, so they are always reported together: applications of a block, residual sub-layers (attention,
feed-forward and projection) and weight layers (qkv, out, fc1, fc2 and the projection's fc1, fc2).
"""

import re
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from sret_scale.model.applications import (
    application_slots,
    num_projections,
    resolved_scheme,
    resolved_skip,
)
from sret_scale.model.conditioning import NUM_DEPTH_FEATURES
from sret_scale.model.config import SReTConfig, StackConfig
from sret_scale.model.stack import StackModel
from sret_scale.model.stage import Stage
from sret_scale.model.text.text_config import TextConfig, TranslationConfig


def describe(config: StackConfig, image_size: int | None = None) -> dict[str, Any]:
    """JSON-ready counts for one image, one window of text, or one row of translation, full on both sides.

    `macs` counts all; `macs_published` leaves the head out, as the paper does.
    """
    if image_size is not None:
        if not hasattr(config, "image_size"):
            raise ValueError("an image size is for models of images: leave it out")
        config = replace(config, image_size=image_size)  # type: ignore[call-arg]
    # Padding is no part of a model: what is counted is what the published layout holds.
    config = replace(config, padded=False)
    with torch.device("meta"):
        model = config.build()
    stages = [_stage_row(config, index, model) for index in range(len(config.stages))]
    stem_macs = pool_macs = 0
    measured = config.measured_macs()
    if isinstance(config, TextConfig):
        unit = "tokens" if isinstance(config, TranslationConfig) else "bytes"
        sizes: dict[str, Any] = {"context": config.context, "unit": unit}
        scores = config.context * config.vocabulary
    else:
        sizes = {name: getattr(config, name) for name in ("image_size", "num_classes")}
        scores = sizes["num_classes"]
    if getattr(config, "head", None) == "tokens":
        scores *= (config.grids[-1] if isinstance(config, SReTConfig) else sizes["image_size"]) ** 2
    if isinstance(config, SReTConfig):
        stem_macs, pool_macs = _stem_macs(config), _pool_macs(config)
    head_macs = config.stages[-1].width * scores
    if measured is None:
        body_macs = stem_macs + pool_macs + sum(row["macs"] for row in stages)
    else:
        body_macs = measured - head_macs
    return {
        **sizes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": body_macs + head_macs,
        "macs_published": body_macs,
        "applications": config.num_applications,
        "residual_sublayers": sum(row["residual_sublayers"] for row in stages),
        "weight_layers": sum(row["weight_layers"] for row in stages),
        "stem_macs": stem_macs,
        "pool_macs": pool_macs,
        "head_macs": head_macs,
        "stages": stages,
    }


def _stage_row(config: StackConfig, index: int, model: StackModel) -> dict[str, Any]:
    stage, applications = config.stages[index], config.stages[index].num_applications
    sizes: dict[str, Any] = {"tokens": config.num_tokens(index), "macs": _stage_macs(config, index)}
    sub_layers, layers = (3, 6) if config.has_memory(index) else (2, 4)
    if isinstance(config, SReTConfig):
        grid = config.grids[index]
        sizes |= {"grid": grid, "tokens": grid * grid}
    elif isinstance(inner := getattr(cast(Stage, model.stages[index]).blocks[0], "inner", None), nn.Module):
        # Of a block that is not ours; what has a norm in front is a sub-layer.
        sizes = {"grid": "-", "tokens": "-", "macs": "-"}
        sub_layers = sum(re.fullmatch(r"(\d+\.)?norm\d?", name) is not None for name, _ in inner.named_modules())
        layers = sum(isinstance(module, nn.Linear | nn.Conv2d) for module in inner.modules())
    projected = applications if num_projections(stage) else 0
    return {
        **sizes,
        "width": stage.width,
        "heads": stage.num_heads,
        "blocks": stage.num_blocks,
        "loops": stage.num_loops,
        "loop_order": stage.loop_order,
        "groups": list(stage.groups),
        "slices": f"windows of {stage.window}" if stage.slices == "windows" else stage.slices,
        "projections": stage.projections,
        "branch_scheme": resolved_scheme(stage),
        "skip": resolved_skip(stage),
        "norm_placement": stage.norm_placement,
        "conditioning": stage.conditioning,
        "applications": applications,
        "residual_sublayers": sub_layers * applications + projected,
        "weight_layers": layers * applications + 2 * projected,
        "parameters": sum(parameter.numel() for parameter in model.stages[index].parameters()),
    }


def _stage_macs(config: StackConfig, index: int) -> int:
    """Linear layers per token, the two products of attention over the tokens of a group, and conditioning."""
    stage, num_tokens = config.stages[index], config.num_tokens(index)
    width = stage.width
    linear = 4 * width * width + 2 * width * stage.hidden_width
    if num_projections(stage):
        linear += 2 * width * stage.projection_hidden_width
    memory = 0
    if config.has_memory(index):
        # Queries and output; attention over a source of as many tokens; keys and values once for each block.
        linear += 2 * width * width
        memory = num_tokens * width * (2 * num_tokens * stage.num_applications + 2 * width * stage.num_blocks)
    # Of causal scores the half that is hidden costs nothing.
    width_seen = width if config.is_causal else 2 * width
    attention = sum(width_seen * num_tokens // slot.groups for slot in application_slots(config, index))
    if stage.conditioning == "input_gated":
        linear += width * width
    # Weights of one loop are made once per forward pass, whatever the batch: counted as if it held one image.
    weights = {
        "low_rank": stage.conditioning_rank * width * (3 * width + stage.hidden_width),
        "norm_by_depth": NUM_DEPTH_FEATURES * 4 * width,
    }.get(stage.conditioning, 0)
    if stage.slices == "windows":
        weights += stage.num_heads * (2 * stage.window - 1) ** 2 * stage.window**4
    body = num_tokens * (stage.num_applications * linear + attention) + stage.num_applications * weights
    return body + memory


def _stem_macs(config: SReTConfig) -> int:
    width, side, total = config.stages[0].width, config.image_size, 0
    if config.stem == "pixels":
        return side * side * config.in_channels * width
    widths = (config.in_channels, width // 2, width, width)
    for before, after, stride in zip(widths, widths[1:], config.stem_strides, strict=False):
        side = -(-side // stride)
        total += side * side * 9 * before * after
    return total


def _pool_macs(config: SReTConfig) -> int:
    pairs = zip(config.grids[1:], config.stages[1:], strict=True)
    return sum(grid * grid * 9 * stage.width for grid, stage in pairs)
