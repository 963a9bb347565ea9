"""Ties the blocks of an untied model into few: what each block of the new model loops over is the mean of what it was.

Everything else is kept: every application has the projection, the slices and the size of its branches that it had, so
the tied model differs from the untied one as far as its blocks differ from each other, and not at all where they agree.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sret_scale.model.applications import application_slots, residual_constants, resolved_scheme, resolved_skip
from sret_scale.model.config import SReTConfig, StageConfig
from sret_scale.model.vision.sret import SReT


def tied(model: SReT, num_blocks: Sequence[int], *, keeps_norms: bool = False) -> SReT:
    """A model of `num_blocks` blocks a stage that loop as often as makes up the untied model's applications.

    keeps_norms: each loop keeps the LayerNorms of the block that it was (conditioning `norm_per_loop`). ValueError
    where that cannot be.
    """
    config = tied_config(model.config, num_blocks, keeps_norms=keeps_norms)
    new = SReT(config).to(model.position.device, model.position.dtype).train(model.training)
    state, target = model.state_dict(), new.state_dict()
    for name in target:
        if not name.startswith("stages."):
            target[name] = state[name]
    for index in range(len(config.stages)):
        _tie_stage(model.config, config, index, state, target)
    new.load_state_dict(target)
    return new


def tied_config(config: SReTConfig, num_blocks: Sequence[int], *, keeps_norms: bool) -> SReTConfig:
    """The config of the tied model."""
    if len(num_blocks) != len(config.stages):
        raise ValueError(
            f"expected a number of blocks for each of {len(config.stages)} stages, got {tuple(num_blocks)}"
        )
    stages = tuple(
        _tied_stage(index, stage, count, keeps_norms)
        for index, (stage, count) in enumerate(zip(config.stages, num_blocks, strict=True))
    )
    return replace(config, stages=stages)


def _tied_stage(index: int, stage: StageConfig, num_blocks: int, keeps_norms: bool) -> StageConfig:
    if stage.num_loops != 1:
        raise ValueError(f"stage {index} is tied already: its blocks have {stage.num_loops} loops, expected 1")
    if num_blocks < 1 or stage.num_blocks % num_blocks:
        divisors = [count for count in range(1, stage.num_blocks + 1) if stage.num_blocks % count == 0]
        raise ValueError(
            f"stage {index}: {stage.num_blocks} blocks cannot be tied into {num_blocks}: expected one of {divisors}"
        )
    if stage.conditioning != "none":
        raise ValueError(
            f"stage {index}: conditioning {stage.conditioning!r} tells loops apart, and the untied model has one: "
            "expected a model with conditioning 'none'"
        )
    return replace(
        stage,
        num_blocks=num_blocks,
        num_loops=stage.num_blocks // num_blocks,
        groups=(stage.groups_of(0),),
        # All loops or none are permuted, as the one loop was.
        permute_from_loop=0 if stage.permute_from_loop == 0 else stage.num_blocks,
        projections="none" if stage.projections == "none" else "per_application",
        branch_scheme=resolved_scheme(stage),
        skip=resolved_skip(stage),
        conditioning="norm_per_loop" if keeps_norms else "none",
    )


def _tie_stage(
    before: SReTConfig,
    after: SReTConfig,
    index: int,
    state: dict[str, Tensor],
    target: dict[str, Tensor],
) -> None:
    """Fills in one stage's tensors of `target`."""
    old_slots, new_slots = application_slots(before, index), application_slots(after, index)
    old_scales, new_scales = (residual_constants(config.stages[index]) for config in (before, after))
    # Multipliers depend on the loops: the coefficients take the difference up.
    factors = [old.multiplier / new.multiplier for old, new in zip(old_scales, new_scales, strict=True)]
    prefix = f"stages.{index}."
    members: dict[int, list[int]] = {}
    for old, new in zip(old_slots, new_slots, strict=True):
        members.setdefault(new.block, []).append(old.block)
        if new.projection is not None:
            _copy(
                state,
                target,
                f"{prefix}projections.{old.projection}.",
                f"{prefix}projections.{new.projection}.",
                factors[1],
            )
    for block, blocks in members.items():
        own = f"{prefix}blocks.{block}."
        for name in [name.removeprefix(own) for name in target if name.startswith(own)]:
            if name == "conditioning.delta":
                continue
            value = torch.stack([state[f"{prefix}blocks.{old}.{name}"] for old in blocks]).mean(dim=0)
            target[own + name] = value * factors[0] if name.endswith(".beta") else value
        if f"{own}conditioning.delta" in target:
            target[f"{own}conditioning.delta"] = torch.stack([
                torch.stack([
                    torch.stack([state[f"{prefix}blocks.{old}.{norm}.{part}"] - target[f"{own}{norm}.{part}"]
                                 for part in ("weight", "bias")])
                    for norm in ("norm1", "norm2")
                ])
                for old in blocks
            ])  # fmt: skip


def _copy(state: dict[str, Tensor], target: dict[str, Tensor], source: str, name: str, factor: float) -> None:
    for full in [full for full in target if full.startswith(name)]:
        value = state[source + full.removeprefix(name)]
        target[full] = value * factor if full.endswith(".beta") else value
