"""The layout of the published SReT checkpoints: its state-dict keys against ours.

The reference lists a stage's blocks and projections as one sequence, a shared block once per loop.
"""

from collections.abc import Iterator

from sret_scale.model.config import SReTConfig
from sret_scale.model.depth import application_slots

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
