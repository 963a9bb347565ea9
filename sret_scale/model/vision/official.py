"""The layout of the published SReT checkpoints: its state-dict keys against ours.

The reference lists a stage's blocks and projections as one sequence, a shared block once per loop.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sret_scale.model.applications import application_slots, resolved_scheme, resolved_skip
from sret_scale.model.config import SReTConfig
from sret_scale.model.vision.padding import padded_state, unpadded_config, unpadded_state
from sret_scale.model.vision.presets import PRESETS
from sret_scale.model.vision.sret import SReT

_BLOCK = {
    "norm1": "norm1",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "norm2": "norm2",
    "mlp.fc1": "feed_forward.fc1",
    "mlp.fc2": "feed_forward.fc2",
}
_BLOCK_COEFFICIENTS = {1: "residual1.alpha", 2: "residual1.beta", 3: "residual2.alpha", 4: "residual2.beta"}
_PROJECTION = {"norm1": "norm", "mlp.fc1": "feed_forward.fc1", "mlp.fc2": "feed_forward.fc2"}
_PROJECTION_COEFFICIENTS = {1: "residual.alpha", 2: "residual.beta"}


def published_names(config: SReTConfig) -> dict[str, str]:
    """Published key -> our name, in the published order; a shared tensor of ours appears under several keys."""
    return dict(_pairs(config))


def _pairs(config: SReTConfig) -> Iterator[tuple[str, str]]:
    yield "pos_embed", "position"
    for layer in range(3):
        yield from _weight_and_bias(f"patch_embed.conv{layer + 1}", f"stem.convs.{layer}")
        theirs, ours = f"patch_embed.bn{layer + 1}", f"stem.norms.{layer}"
        yield from _weight_and_bias(theirs, ours)
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            yield f"{theirs}.{buffer}", f"{ours}.{buffer}"
    for index in range(len(config.stages)):
        for position, slot in enumerate(application_slots(config, index)):
            theirs, ours = f"transformers.{index}.blocks", f"stages.{index}"
            block = f"{ours}.blocks.{slot.block}"
            yield from _part(f"{theirs}.{2 * position}", block, _BLOCK, _BLOCK_COEFFICIENTS)
            if slot.projection is not None:
                projection = f"{ours}.projections.{slot.projection}"
                yield from _part(f"{theirs}.{2 * position + 1}", projection, _PROJECTION, _PROJECTION_COEFFICIENTS)
    for index in range(len(config.stages) - 1):
        yield from _weight_and_bias(f"pools.{index}.conv", f"pools.{index}")
    yield from _weight_and_bias("norm", "norm")
    yield from _weight_and_bias("head", "head")


def _weight_and_bias(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for kind in ("weight", "bias"):
        yield f"{theirs}.{kind}", f"{ours}.{kind}"


def _part(theirs: str, ours: str, layers: dict[str, str], coefficients: dict[int, str]) -> Iterator[tuple[str, str]]:
    for their_layer, our_layer in layers.items():
        yield from _weight_and_bias(f"{theirs}.{their_layer}", f"{ours}.{our_layer}")
    for number, our_coefficient in coefficients.items():
        yield f"{theirs}.coefficient{number}.bias", f"{ours}.{our_coefficient}"


def require_published_layout(config: SReTConfig) -> None:
    """ValueError where the published layout has no place for what a config asks for."""
    for index, stage in enumerate(config.stages):
        found = {
            "loop_order": (stage.loop_order, "block"),
            "projections": (stage.projections, "per_application"),
            "branch_scheme": (resolved_scheme(stage), "published"),
            "skip": (resolved_skip(stage), "learned"),
            "norm_placement": (stage.norm_placement, "pre"),
            "conditioning": (stage.conditioning, "none"),
            "slices": (stage.slices, "raster"),
        }
        for name, (value, published) in found.items():
            if value != published:
                raise ValueError(
                    f"the published layout holds {name} {published!r} only, stage {index} has {value!r}; "
                    "keep this model as safetensors"
                )
    for name, published in (("stem", "convolutions"), ("positions", "learned"), ("head", "classes")):
        if getattr(config, name) != published:
            raise ValueError(f"the published layout holds {name} {published!r} only, not {getattr(config, name)!r}")
    if config.stem_norm not in ("batch", "sync_batch"):
        raise ValueError(f"the published layout holds a BatchNorm stem only, this model has {config.stem_norm!r}")


def to_published(config: SReTConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published state dict of ours: a shared block is listed once per loop, as the same tensors."""
    require_published_layout(config)
    if config.padded:
        state = unpadded_state(config, state, _meta_state(unpadded_config(config)))
    return {theirs: state[ours] for theirs, ours in published_names(config).items()}


def from_published(config: SReTConfig, published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict of a published one; ValueError for a key too many or too few, a shape, or aliases that differ."""
    require_published_layout(config)
    names = published_names(config)
    if set(published) != set(names):
        missing, extra = sorted(set(names) - set(published)), sorted(set(published) - set(names))
        raise ValueError(
            f"the keys do not fit this model: {len(missing)} missing {missing[:2]}, {len(extra)} unknown {extra[:2]}"
        )
    state: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    for theirs, ours in names.items():
        value = published[theirs]
        if ours in state and not torch.equal(state[ours], value):
            raise ValueError(f"{first[ours]} and {theirs} are one shared tensor in this model, but their values differ")
        state[ours] = value
        first.setdefault(ours, theirs)
    return padded_state(config, state, _meta_state(config)) if config.padded else state


def recognised_config(published: dict[str, Tensor]) -> tuple[str, SReTConfig]:
    """(preset, config) whose weights a published state dict holds, at its own image size and number of classes.

    Slicing leaves no trace in the weights: the bare preset is taken, with as many groups as its grids allow.
    """
    for key in ("pos_embed", "head.weight", "patch_embed.conv1.weight"):
        if key not in published:
            raise ValueError(f"this is no published SReT state dict: it has no {key}")
    position, head = published["pos_embed"], published["head.weight"]
    for name, config in PRESETS.items():
        # Every named model of another size or slicing has the weights of its bare name.
        if not re.fullmatch(r"sret_(t|lt|s)(_\d{3,4})?", name) or name.endswith(("_384", "_512")):
            continue
        candidate = replace(
            config,
            image_size=position.shape[-1] * 2 ** config.stem_strides.count(2),
            num_classes=head.shape[0],
            in_channels=published["patch_embed.conv1.weight"].shape[1],
            group_fit="nearest",
        )
        if _shapes(candidate) == {key: tuple(value.shape) for key, value in published.items()}:
            return name, candidate
    raise ValueError(
        f"these weights fit no preset: position {tuple(position.shape)}, head {tuple(head.shape)}, "
        f"{len(published)} keys"
    )


def _meta_state(config: SReTConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return SReT(config).state_dict()


def _shapes(config: SReTConfig) -> dict[str, tuple[int, ...]]:
    state = _meta_state(config)
    # A frozen coefficient is no parameter of ours, so that config cannot be in the published layout.
    return {
        theirs: tuple(state[ours].shape) if ours in state else () for theirs, ours in published_names(config).items()
    }
