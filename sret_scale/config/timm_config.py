"""The configuration of a backbone of timm as the model of a run, and the short form `timm:NAME?key=value&key=value`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sret_scale.memory.planning.costs import forward_flops
from sret_scale.model import StageConfig
from sret_scale.model.config import ImageConfig, require_list, require_number, require_positive

if TYPE_CHECKING:
    from sret_scale.timm.timm_stack import TimmModel

# Of a stage, what a block of timm leaves open, and what it does not.
_OF_STAGE = ("num_blocks", "num_loops", "loop_order", "projections", "projection_ratio", "conditioning")
_OF_OUR_BLOCKS = ("groups", "slices", "norm_placement", "mlp_ratio")
_PLAIN = StageConfig(width=1, num_heads=1, num_blocks=1)
_OF_TIMM = {"img_size": "image_size", "in_chans": "in_channels"}
"""What timm calls fields of ours."""
_OF_MODEL = ("image_size", "num_classes", "in_channels", "head", "drop_path", "step_size", "unit", "at")


@dataclass(frozen=True, kw_only=True)
class TimmConfig(ImageConfig):
    """A backbone of timm whose chains of blocks are recursive (docs/backbones.md); every stage is a chain.

    name: of timm's registry, or a class of it such as MlpMixer.
    arguments: `name=value` of its constructor, such as depth=8.
    step_size: x + step_size * (block(x) - x), of a whole block; the branches inside are the block's own.
    unit, at: as of `make_recursive`.
    """

    kind: Literal["timm"] = "timm"
    name: str
    arguments: tuple[str, ...] = ()
    step_size: float = 1.0
    unit: int = 1
    at: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "arguments", require_list("arguments", self.arguments))
        require_positive("unit", self.unit)
        require_number("step_size", self.step_size)
        fixed = [(name, getattr(one, name), getattr(_PLAIN, name)) for one in self.stages for name in _OF_OUR_BLOCKS]
        fixed += [("dropout", self.dropout, 0.0), ("permutation", self.permutation, "fixed")]
        for name, value, only in [*fixed, ("padded", self.padded, False)]:
            if value != only:
                raise ValueError(f"{name} is of SReT's blocks, not of timm's: expected {only}, got {value}")

    def num_tokens(self, index: int) -> int:
        """1: no attention here is cut into slices, so the number is not asked for."""
        return 1

    def network(self) -> nn.Module:
        """The backbone as timm makes it. ValueError for a name or an argument that is not there."""
        from sret_scale.timm.door import make_network

        own = dict(item.partition("=")[::2] for item in self.arguments)
        shape = {"num_classes": self.num_classes, "in_chans": self.in_channels, "img_size": self.image_size}
        pooling = {"global_pool": ""} if self.head == "tokens" else {}
        return make_network(self.name, shape | {key: yaml.safe_load(text) for key, text in own.items()} | pooling)

    def build(self, trained: Path | None = None) -> "TimmModel":
        """See `StackConfig.build`. Of the blocks that become one the first is taken: a mean of random ones is small.

        trained: a file with weights of the untied network, of whose blocks the means are taken; no code in it is run.
        ValueError or OSError where it is not there, or does not fit.
        """
        from sret_scale.timm.door import with_weights
        from sret_scale.timm.recursive import chains_of, make_recursive
        from sret_scale.timm.timm_stack import TimmModel

        net, init = self.network(), "mean" if trained else "first"
        if trained:
            net = with_weights(net, self.name, trained)
        names = chains_of(net, self.at)
        if len(names) != len(self.stages):
            raise ValueError(f"stages: expected one for each of {', '.join(names)}, got {len(self.stages)}")
        for name, stage in zip(names, self.stages, strict=True):
            counts: dict[str, Any] = {"num_blocks": stage.num_blocks, "num_loops": stage.num_loops, "init": init}
            make_recursive(net, order=stage.loop_order, unit=self.unit, at=name, **counts)
        return TimmModel(self, net, self.step_size)

    def measured_macs(self) -> int:
        """Those of the products in one image's pass, counted in it."""
        with torch.device("meta"):
            # Torch's counter of products looks for the gradient of every tensor that needs one.
            model = self.build().eval().requires_grad_(False)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            return forward_flops(lambda: model(self.example(1))) // 2


def timm_config(spec: str) -> TimmConfig:
    """The configuration that `timm:NAME?num_blocks=4&num_loops=3` names.

    Keys are those of `_OF_STAGE`, for every chain, and of `_OF_MODEL`; what is none of them goes to timm's constructor
    of the network, as does `timm.KEY` in any case. Blocks and loops default to the backbone's own, projections to none.
    """
    from sret_scale.timm.recursive import chains_of, width_of

    name, _, query = spec.removeprefix("timm:").partition("?")
    items = [item.partition("=")[::2] for item in query.split("&") if item]
    options, keys = dict(items), [key for key, _ in items]
    if wrong := [key for key, text in items if not text or keys.count(key) > 1]:
        raise ValueError(f"{spec}: expected key=value, each once, got {wrong[0]!r} without a value or twice")
    if given := sorted(_OF_TIMM.keys() & {key.removeprefix("timm.") for key in keys}):
        raise ValueError(f"{spec}: {given[0]} is {_OF_TIMM[given[0]]} here: give that")
    own, of_stage = (
        {key: yaml.safe_load(options.pop(key)) for key in keys if key in options} for keys in (_OF_MODEL, _OF_STAGE)
    )
    arguments = tuple(f"{key.removeprefix('timm.')}={text}" for key, text in options.items())
    if len({text.partition("=")[0] for text in arguments}) < len(arguments):
        raise ValueError(f"{spec}: an argument of timm's stands there with and without `timm.`: give it once")
    config = TimmConfig(name=name, arguments=arguments, stages=(_PLAIN,), **own)
    try:
        with torch.device("meta"):
            net, stages = config.network(), []
    except ValueError as error:
        if not options:
            raise
        raise ValueError(f"{error}; keys of ours: {', '.join((*_OF_STAGE, *_OF_MODEL))}") from error
    for chain in chains_of(net, config.at):
        blocks = [*net.get_submodule(chain).children()]
        if not blocks:
            raise ValueError(f"{spec}: {chain} has no blocks")
        chosen = {"num_blocks": len(blocks) // config.unit, "projections": "none", **of_stage}
        require_positive("num_blocks", chosen["num_blocks"])
        loops = max(1, len(blocks) // config.unit // chosen["num_blocks"])
        stages.append(StageConfig(width=width_of(blocks[0]), num_heads=1, **{"num_loops": loops, **chosen}))
    return dataclasses.replace(config, stages=tuple(stages))
