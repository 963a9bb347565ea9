"""Recursion in a timm model: the chain of its blocks becomes a few blocks that are applied many times.

For the families that run `self.blocks`: ViT and DeiT, Mixer, ResMLP and gMLP, CaiT, ConvMixer, and the stages of Swin.
"""

import fnmatch
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sret_scale.memory import MemoryConfig
from sret_scale.memory.recursion import Injection, Recursion
from sret_scale.model import conditioning as told
from sret_scale.model.applications import LoopPosition, ResidualConstants, order_of_uses
from sret_scale.model.config import LoopOrder, SReTConfig, StageConfig
from sret_scale.model.layers import NonLinearProjection
from sret_scale.model.stored_sizes import Sizes, stored_sizes
from sret_scale.timm.door import import_timm

Init = Literal["mean", "first"]
Projections = Literal["none", "per_application"]


def in_loop(
    block: nn.Module, own: told.Conditioning | None, loop: int, place: LoopPosition | None, x: Tensor, **kwargs: Any
) -> Tensor:
    """What a block gives in one of its loops, with scale and bias of `norm1` and `norm2` as they are there.

    own: what tells the block its loops, which may change none; place: of the loop, where depth is not the trained one.
    """
    norms = None if own is None else own.deltas(loop, place).norms
    if norms is None:
        return cast(Tensor, block(x, **kwargs))
    places = [(f"norm{i + 1}.{name}", (i, k)) for i in range(2) for k, name in enumerate(("weight", "bias"))]
    shifted = {name: block.get_parameter(name) + norms[place] for name, place in places}
    return cast(Tensor, functional_call(block, shifted, (x,), kwargs))


def conditioned(block: nn.Module, stage: StageConfig) -> told.Conditioning | None:
    """What tells a block its loops, as of `model.conditioning`. ValueError where the block does not allow it."""
    kind, name = stage.conditioning, type(block).__name__
    if kind == "low_rank":
        raise ValueError(f"conditioning: low_rank changes layers of SReT's own blocks, and this is a {name}")
    norms = [getattr(block, norm, None) for norm in ("norm1", "norm2")]
    if kind.startswith("norm") and not all(isinstance(norm, nn.LayerNorm) and norm.bias is not None for norm in norms):
        raise ValueError(f"conditioning: {kind} shifts LayerNorms norm1 and norm2 of a block, which a {name} lacks")
    return told.conditioning(stage, _sizes(stage))


def _sizes(stage: StageConfig) -> Sizes:
    return stored_sizes(SReTConfig(stages=(stage,)), 0)


class _InLoop(nn.Module):
    """A block in one of its loops."""

    def __init__(self, block: nn.Module, own: nn.Module, loop: int, num_loops: int) -> None:
        super().__init__()
        self.block, self.own = block, own
        self.place = LoopPosition(loop, num_loops, ResidualConstants(1.0, 1.0), ResidualConstants(1.0, 1.0))

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return in_loop(self.block, cast(Any, self.own), self.place.position, self.place, x, **kwargs)


class RecursiveBlocks(Recursion):
    """What stands in a model's `blocks`. Its elements are applications: timm counts, iterates, slices and checkpoints
    them. conditioning: what tells each block its loops, or nothing."""

    stop: int | None = None

    def __init__(self, blocks: Sequence[nn.Module], num_loops: int, **options: Any) -> None:
        super().__init__(blocks, num_loops, **options)
        # Registered by timm's own names for the blocks of a chain, by which its layer decay and its checkpoints go.
        del self.blocks
        self.__dict__["blocks"] = list(blocks)
        for index, block in enumerate(self.blocks):
            self.add_module(str(index), block)
        self.conditioning: Any = nn.ModuleList()

    def _links(self, plan: Sequence[tuple[int, int]], *args: Any, **kwargs: Any) -> list[Any]:
        links: list[Any] = super()._links(plan, *args, **kwargs)
        loops = 1 + max(loop for _, loop in plan)
        for link in links if self.conditioning else ():
            link.modules[0] = _InLoop(link.modules[0], self.conditioning[link.block], link.loop, loops)
        return links

    def applications(self, num_loops: int | None = None) -> list[tuple[int, int]]:
        """Of a slice, those of the whole recursion that it keeps."""
        return super().applications(num_loops)[: self.stop]

    def __len__(self) -> int:
        return len(self.applications())

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        return iter([self[index] for index in range(len(self))])

    def __getitem__(self, index: int | slice) -> Any:
        """An application, or the recursion of the first ones; ValueError for another slice."""
        if isinstance(index, slice):
            if index.start or index.step not in (None, 1):
                raise ValueError(f"a recursion can be cut behind an application, not to {index}")
            kept = RecursiveBlocks.__new__(RecursiveBlocks)
            kept.__dict__ = {**self.__dict__, "_planned": {}, "stop": len(range(len(self))[index])}
            return kept
        plan = self.applications()
        index = range(len(plan))[index]

        def application(x: Tensor, **kwargs: Any) -> Tensor:
            return self._links(plan, x, kwargs)[index](x)

        return application


def make_recursive(
    model: nn.Module,
    *,
    num_blocks: int | None = None,
    num_loops: int | None = None,
    order: LoopOrder = "block",
    init: Init = "mean",
    projections: Projections = "none",
    projection_ratio: float = 1.0,
    injection: Injection = "none",
    conditioning: Literal["none", "norm_per_loop", "norm_by_depth"] = "none",
    step_size: float = 1.0,
    unit: int = 1,
    at: str | None = None,
    memory: MemoryConfig | None = None,
) -> nn.Module:
    """The model, its chain of blocks replaced in place by one of `num_blocks` blocks, applied `num_loops` times each.

    num_blocks: how many stay; it divides the number there was. Default: all.
    num_loops: default: as many as keep the number of applications.
    order, injection, step_size, memory: as of `Recursion`.
    init: the blocks that become one are averaged ("mean"), or the first of them is taken.
    projections: "per_application" puts the paper's non-linear projection behind each (its hidden layer is
        projection_ratio times as wide). It needs blocks whose last axis is the channels.
    conditioning: LayerNorms `norm1` and `norm2` of a block differ by loop, or by a smooth function of the depth, from
        zero at first (`model.conditioning`).
    unit: blocks of the model that make one: 2 for Swin, where every second one has shifted windows.
    at: dotted path of the chains, with * for any name; default: `blocks`, or `layers.*.blocks`.
    ValueError where a number does not fit, a chain is not there, or its blocks are not alike.
    """
    found = chains_of(model, at)
    for choice, value, known in (("init", init, Init), ("projections", projections, Projections)):
        if value not in get_args(known):
            raise ValueError(f"{choice}: expected one of {', '.join(get_args(known))}, got {value!r}")
    for name in found:
        parent, _, last = name.rpartition(".")
        if isinstance(model.get_submodule(name), RecursiveBlocks):
            raise ValueError(f"{name} is recursive already: `set_loops` gives it other loops")
        blocks = [*model.get_submodule(name).children()]
        units = _units(name, blocks, unit)
        kept = len(units) if num_blocks is None else num_blocks
        if kept < 1 or len(units) % kept:
            raise ValueError(f"num_blocks: expected a divisor of the {len(units)} of {name}, got {kept}")
        share = len(units) // kept
        uses = [block for block, _ in order_of_uses(order, kept, share)]
        alike = ([one for one, used in zip(units, uses, strict=True) if used == block] for block in range(kept))
        tied = [_merged(name, ours, init) for ours in alike]
        loops = share if num_loops is None else num_loops
        options: dict[str, Any] = {"order": order, "injection": injection, "step_size": step_size, "memory": memory}
        chain = RecursiveBlocks(tied, loops, **options)
        if not projections == conditioning == "none":
            own: dict[str, Any] = {"projection_ratio": projection_ratio, "conditioning": conditioning}
            stage = StageConfig(width=width_of(tied[0]), num_heads=1, num_blocks=kept, num_loops=loops, **own)
        if projections != "none":
            chain.projections.extend(NonLinearProjection(stage, _sizes(stage)) for _ in chain.applications())
        if conditioning != "none":
            chain.conditioning.extend(conditioned(block, stage) or block for block in tied)
        setattr(model.get_submodule(parent), last, chain)
    _tell_features(model)
    return model


def recursions(model: nn.Module) -> list[RecursiveBlocks]:
    """The recursive chains of a model, in their order."""
    return [module for module in model.modules() if isinstance(module, RecursiveBlocks)]


def set_loops(model: nn.Module, num_loops: int) -> None:
    """Another number of loops for every chain; ValueError below 1, or where loops have weights of their own."""
    for chain in recursions(model):
        owned = "its projection" if chain.projections else "norms of its own"
        if num_loops < 1 or chain.projections or any(isinstance(own, told.NormPerLoop) for own in chain.conditioning):
            wanted = f"no other, since each application has {owned}" if num_loops >= 1 else "at least 1"
            raise ValueError(f"num_loops: expected {wanted}, got {num_loops}")
        chain.num_loops = num_loops
    _tell_features(model)


def _tell_features(model: nn.Module) -> None:
    """timm looks up a feature of every application where the model has one chain."""
    chains, known = recursions(model), getattr(model, "feature_info", None)
    if len(chains) == 1 and isinstance(known, list) and known:
        model.feature_info = [{**known[0], "module": f"blocks.{index}"} for index in range(len(chains[0]))]  # type: ignore[assignment]


def register_recursive() -> None:
    """Put `recursive.NAME` into timm's registry, for every NAME of timm's own that has a chain of blocks."""
    timm = import_timm()
    if not timm.is_model("recursive"):
        timm.models.register_model(recursive)


def recursive(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
    """`timm.create_model("recursive.deit_tiny_patch16_224", num_loops=2)`; takes keywords of `make_recursive` too."""
    timm = import_timm()
    if not isinstance(pretrained_cfg, str):
        raise ValueError(f"recursive: expected the name of a model of timm behind the dot, got {pretrained_cfg}")
    known = inspect.signature(make_recursive).parameters
    own = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
    is_features, indices = kwargs.pop("features_only", False), kwargs.pop("out_indices", 3)
    kwargs.pop("feature_cls", None)  # There is one way to get features of a chain.
    model = make_recursive(timm.create_model(pretrained_cfg, pretrained=pretrained, **kwargs), **own)
    if not is_features:
        return model
    features = timm.models._features.FeatureGetterNet(model, out_indices=indices)
    features.pretrained_cfg = features.default_cfg = model.pretrained_cfg
    return features


def chains_of(model: nn.Module, at: str | None = None) -> list[str]:
    """Dotted paths of a model's chains of blocks; ValueError where there is none."""
    paths = ("blocks", "layers.*.blocks") if at is None else (at,)
    found = [name for name, _ in model.named_modules() if any(fnmatch.fnmatch(name, path) for path in paths)]
    if not found:
        raise ValueError(
            f"at: {type(model).__name__} has no chain of blocks at {' or '.join(paths)}; give the dotted path of "
            f"an nn.Sequential of equal blocks; its parts: {', '.join(name for name, _ in model.named_children())}"
        )
    return found


def _units(name: str, blocks: Sequence[nn.Module], unit: int) -> list[nn.Module]:
    """The blocks, `unit` of them in one module; ValueError if these are not alike."""
    if unit < 1 or len(blocks) % unit or not blocks:
        raise ValueError(f"unit: expected a divisor of the {len(blocks)} blocks of {name}, got {unit}")
    units = [
        block if unit == 1 else nn.Sequential(*blocks[i * unit : (i + 1) * unit])
        for i, block in enumerate(blocks[::unit])
    ]
    first = _shapes(units[0])
    for index, other in enumerate(units):
        differing = {key for key in {**first, **_shapes(other)} if first.get(key) != _shapes(other).get(key)}
        if differing:
            key = min(differing)
            raise ValueError(
                f"{name}: blocks 0 and {index} are not alike: {key} is {first.get(key, 'missing')} and "
                f"{_shapes(other).get(key, 'missing')}; a chain whose blocks take turns (Swin) needs unit=2"
            )
    return units


def _shapes(block: nn.Module) -> dict[str, object]:
    """What has to be the same where one block can stand for another: every tensor's shape, and Swin's shift."""
    found: dict[str, object] = {key: tuple(value.shape) for key, value in block.state_dict().items()}
    for key, module in block.named_modules():
        if hasattr(module, "shift_size"):
            found[f"{key}.shift_size".lstrip(".")] = tuple(module.shift_size)
    return found


@torch.no_grad()
def _merged(name: str, blocks: Sequence[nn.Module], init: Init) -> nn.Module:
    """The first block, with the weights of all, and the mean of their drop path rates, which grow with depth."""
    if init == "mean" and len(blocks) > 1:
        states: list[Mapping[str, Tensor]] = [block.state_dict() for block in blocks]
        for key, value in states[0].items():
            if value.is_floating_point():
                value.copy_(torch.stack([state[key] for state in states]).mean(dim=0))
    for path in [path for path, _ in blocks[0].named_modules() if "drop_path" in path.rpartition(".")[2]]:
        rates = [float(getattr(block.get_submodule(path), "drop_prob", 0.0) or 0.0) for block in blocks]
        if any(rates):
            parent, _, last = path.rpartition(".")
            drop_path = import_timm().layers.DropPath(sum(rates) / len(rates))
            setattr(blocks[0].get_submodule(parent), last, drop_path)
    return blocks[0]


def width_of(block: nn.Module) -> int:
    """Channels on the last axis, which a LayerNorm or ResMLP's affine layer knows; ValueError where there is none."""
    norms = (module.normalized_shape[0] for module in block.modules() if isinstance(module, nn.LayerNorm))
    rows = (value.shape[2] for value in block.parameters() if value.ndim == 3 and value.shape[:2] == (1, 1))
    width = next(norms, None) or next(rows, None)
    if width is None:
        raise ValueError(
            f"a {type(block).__name__} has no norm over the last axis, which says how many channels it has"
        )
    return int(width)
