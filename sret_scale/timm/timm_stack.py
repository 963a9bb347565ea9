"""A backbone of timm as the model of a run: its chains become stages that use timm's blocks in the place of ours.

Letters: B batch, N tokens, D width. Where tokens lie as (B, H, W, D), N stands for the dimensions between B and D.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from sret_scale.model.config import ImageConfig, StackConfig
from sret_scale.model.depth_plan import DepthPlan
from sret_scale.model.noise import Noise
from sret_scale.model.stack import ParameterTag, StackModel
from sret_scale.model.stage import Stage
from sret_scale.timm.recursive import RecursiveBlocks, conditioned, in_loop, width_of


class ForeignBlock(nn.Module):
    """A block that is not ours, as an `Application` uses one: x + step_size * mask * (inner(x) - x).

    The mask is stochastic depth, of the whole block; with step_size 1 and no mask nothing is computed but the block.
    """

    norms_after, outer_norm, is_causal = False, None, False
    residuals: tuple[nn.Module, ...] = ()

    def __init__(self, inner: nn.Module, step_size: float, config: StackConfig, index: int) -> None:
        super().__init__()
        stage = config.stages[index]
        self.inner, self.step_size, self.width = inner, step_size, stage.width
        self.num_heads = getattr(getattr(inner, "attn", None), "num_heads", 1)
        self.conditioning = conditioned(inner, stage)

    def forward(self, x_BND: Tensor, loop: int, groups: int, masks: Tensor | None = None, *others: Any) -> Tensor:
        """One use, with the arguments of `layers.Block`; of the others only the place of the loop matters."""
        place = others[1] if len(others) > 1 else None
        y_BND = in_loop(self.inner, self.conditioning, loop, place, x_BND)
        if masks is not None:
            return x_BND + self.step_size * masks[0].view(-1, *[1] * (x_BND.ndim - 1)) * (y_BND - x_BND)
        return y_BND if self.step_size == 1.0 else x_BND + self.step_size * (y_BND - x_BND)

    def finished(self, x_BND: Tensor) -> Tensor:
        """The stream as an application leaves it."""
        return x_BND

    def qkv(self, x_BND: Tensor, *place: Any) -> Tensor | None:
        """(B, N, 3D) queries, keys and values, for whoever looks at attention; None where there is none like ours."""
        attention: Any = getattr(self.inner, "attn", None)
        # Others talk between heads, norm queries and keys, or see windows.
        is_ours = type(attention).__name__ == "Attention" and isinstance(attention.q_norm, nn.Identity)
        return attention.qkv(cast(Any, self.inner).norm1(x_BND)) if is_ours else None


class TimmModel(StackModel):
    """Images to the scores of a timm network whose chains `make_recursive` has replaced; it is taken over.

    step_size: of every application. ValueError where a run cannot train the network.
    """

    config: ImageConfig
    net: Any

    def __init__(self, config: ImageConfig, net: nn.Module, step_size: float) -> None:
        super().__init__()
        _require_repeatable(net)
        chains = {name: module for name, module in net.named_modules() if isinstance(module, RecursiveBlocks)}
        self.config, self.net, self.stages = config, net, nn.ModuleList()
        for index, (name, chain) in enumerate(chains.items()):
            wanted, width = config.stages[index].width, width_of(chain.blocks[0])
            if width != wanted:
                raise ValueError(f"model.stages.{index}.width: expected {width}, that of {name}, got {wanted}")
            blocks = [ForeignBlock(block, step_size, config, index) for block in chain.blocks]
            self.stages.append(Stage(config, index, blocks))
            parent, _, last = name.rpartition(".")
            owner = net.get_submodule(parent)
            delattr(owner, last)
            # Registered once, as a stage: an alias under a second name would lose keys in DeepSpeed's checkpoints.
            owner.__dict__[last] = _Door(self, index)
        # Registered as parts of the network already.
        self.__dict__.update(stem=net, head=self.net.get_classifier())
        self._pass: tuple[Noise | None, DepthPlan | None] = None, None

    def forward(self, inputs: Tensor, noise: Noise | None = None, plans: Sequence[DepthPlan] | None = None) -> Tensor:
        """See `StackModel`; the network is called as a whole, as ZeRO 3 gathers parameters for calls."""
        if plans is not None:
            return super().forward(inputs, noise, plans)
        self._pass = noise, None
        return self._on_grid(self.net(inputs))

    def forward_features(self, inputs: Tensor, noise: Noise | None = None) -> Tensor:
        self._pass = noise, None
        return self.net.forward_features(inputs)

    def forward_stem(self, inputs: Tensor, noise: Noise | None = None) -> Tensor:
        """The images: what stands before the stages is one call with them."""
        return inputs

    def planned_outputs(self, first: Tensor, noise: Noise | None, plan: DepthPlan) -> Iterator[Tensor]:
        """All states go through what follows the stages as one batch, so they are there together."""
        self._pass = noise, plan
        yield from self.net.forward_features(first).chunk(len(plan.ends))

    def forward_head(self, features: Tensor) -> Tensor:
        return self._on_grid(self.net.forward_head(features))

    def _on_grid(self, scores: Tensor) -> Tensor:
        """(B, C) as they are; of tokens (B, N, C) as (B, C, H, W). ValueError where these are not the pixels."""
        if self.config.head == "classes":
            return scores
        side, got = self.config.image_size, tuple(scores.shape[1:-1])
        if got != (side * side,):
            raise ValueError(
                f"head=tokens: expected a token for each of {side} x {side} pixels, got {got} of "
                f"{type(self.net).__name__}: set patch_size=1, and class_token=false where there is one"
            )
        return scores.mT.reshape(len(scores), -1, side, side)

    def parameter_tags(self) -> dict[str, ParameterTag]:
        """As of `StackModel`; what the network itself keeps from decay does not decay, nor do vectors of any shape."""
        told = self.net.no_weight_decay() if hasattr(self.net, "no_weight_decay") else set()
        kept = {name.rpartition(".")[2] for name in told} | {"pos_embed", "cls_token"}
        heads, tags = set(self.head.parameters()), super().parameter_tags()
        for name, parameter in self.named_parameters():
            decays = tags[name].decay and parameter.squeeze().ndim > 1 and name.rpartition(".")[2] not in kept
            tags[name] = replace(tags[name], decay=decays)
            if parameter in heads:
                tags[name] = replace(tags[name], kind="head", layer=tags[name].num_layers - 1)
        return tags

    def run_stage(self, index: int, x_BND: Tensor) -> Tensor:
        """The stream after a stage in the pass of now; the last stage's states that give scores as one batch."""
        stage, (noise, plan) = cast(Stage, self.stages[index]), self._pass
        # The residual stream is fp32 even where a convolution under autocast gave bf16.
        x_BND = x_BND.to(next(stage.parameters()).dtype)
        if plan is None:
            return stage(x_BND, noise)
        counts = plan.supervised if index == len(self.stages) - 1 else ()
        states = list(stage.outputs(x_BND, noise, plan, counts))
        return torch.cat(states) if len(states) > 1 else states[0]


class _Door:
    """Stands in a network for a chain of its blocks, and hands what comes to the stage."""

    def __init__(self, model: TimmModel, index: int) -> None:
        self.model, self.index = model, index

    def __call__(self, x_BND: Tensor) -> Tensor:
        return self.model.run_stage(self.index, x_BND)

    def __iter__(self) -> NoReturn:
        raise ValueError(
            f"{type(self.model.net).__name__} goes through its blocks itself, with arguments of its own such as rotary "
            "tables or masks, which a run has no place for: train it in a loop of yours with `make_recursive`"
        )


def _require_repeatable(net: nn.Module) -> None:
    """ValueError for what would draw again, or counts its runs, when an application is run again."""
    for name, module in net.named_modules():
        what = f"{name} of {type(net).__name__} ({type(module).__name__})"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"{what} counts every run of a block in its statistics: take a backbone with LayerNorms")
        if "Drop" in type(module).__name__ and any(getattr(module, rate, 0.0) for rate in ("p", "drop_prob", "prob")):
            raise ValueError(f"{what} would draw again when its block is run again: use model.drop_path in its place")
