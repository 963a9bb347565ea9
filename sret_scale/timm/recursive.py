"""Recursion in a timm model: the chain of its blocks becomes a few blocks that are applied many times.

For the families that run `self.blocks`: ViT and DeiT, Mixer, ResMLP and gMLP, CaiT, ConvMixer, and the stages of Swin.
"""

import fnmatch
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sret_scale.memory import MemoryConfig
from sret_scale.memory.recursion import Recursion
from sret_scale.model.config import LoopOrder, SReTConfig, StageConfig
from sret_scale.model.layers import NonLinearProjection
from sret_scale.model.stored_sizes import stored_sizes
from sret_scale.timm.door import import_timm

Init = Literal["mean", "first"]
Projections = Literal["none", "per_application"]


class RecursiveBlocks(Recursion):
    """What stands in a model's `blocks`. Its elements are applications: timm counts, iterates, slices and checkpoints
    them."""

    stop: int | None = None

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
    step_size: float = 1.0,
    unit: int = 1,
    at: str | None = None,
    memory: MemoryConfig | None = None,
) -> nn.Module:
    """The model, its chain of blocks replaced in place by one of `num_blocks` blocks, applied `num_loops` times each.

    num_blocks: how many stay; it divides the number there was. Default: all.
    num_loops: default: as many as keep the number of applications.
    order, step_size, memory: as of `Recursion`.
    init: the blocks that become one are averaged ("mean"), or the first of them is taken.
    projections: "per_application" puts the paper's non-linear projection behind each (its hidden layer is
        projection_ratio times as wide). It needs blocks whose last axis is the channels.
    unit: blocks of the model that make one: 2 for Swin, where every second one has shifted windows.
    at: dotted path of the chains, with * for any name; default: `blocks`, or `layers.*.blocks`.
    ValueError where a number does not fit, a chain is not there, or its blocks are not alike.
    """
    found = [name for name, _ in model.named_modules() if any(fnmatch.fnmatch(name, path) for path in _paths(at))]
    if not found:
        raise ValueError(
            f"at: {type(model).__name__} has no chain of blocks at {' or '.join(_paths(at))}; give the dotted path of "
            f"an nn.Sequential of equal blocks; its parts: {', '.join(name for name, _ in model.named_children())}"
        )
    for choice, value, known in (("init", init, Init), ("projections", projections, Projections)):
        if value not in get_args(known):
            raise ValueError(f"{choice}: expected one of {', '.join(get_args(known))}, got {value!r}")
    for name in found:
        parent, _, last = name.rpartition(".")
        blocks = [*model.get_submodule(name).children()]
        units = _units(name, blocks, unit)
        kept = len(units) if num_blocks is None else num_blocks
        if kept < 1 or len(units) % kept:
            raise ValueError(f"num_blocks: expected a divisor of the {len(units)} of {name}, got {kept}")
        share = len(units) // kept
        tied = [
            _merged(name, units[i * share : (i + 1) * share] if order == "block" else units[i::kept], init)
            for i in range(kept)
        ]
        loops = share if num_loops is None else num_loops
        own = _projections(tied[0], kept, loops, projection_ratio) if projections == "per_application" else ()
        chain = RecursiveBlocks(tied, loops, order=order, step_size=step_size, projections=own, memory=memory)
        setattr(model.get_submodule(parent), last, chain)
    _tell_features(model)
    return model


def recursions(model: nn.Module) -> list[RecursiveBlocks]:
    """The recursive chains of a model, in their order."""
    return [module for module in model.modules() if isinstance(module, RecursiveBlocks)]


def set_loops(model: nn.Module, num_loops: int) -> None:
    """Another number of loops for every chain; ValueError below 1, or with projections, which fix it."""
    for chain in recursions(model):
        if num_loops < 1 or chain.projections:
            wanted = "no other, since each application has its projection" if chain.projections else "at least 1"
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


def _paths(at: str | None) -> Sequence[str]:
    return ("blocks", "layers.*.blocks") if at is None else (at,)


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


def _projections(block: nn.Module, num_blocks: int, num_loops: int, ratio: float) -> list[nn.Module]:
    norms = [module for module in block.modules() if isinstance(module, nn.LayerNorm)]
    if not norms:
        raise ValueError(
            f"projections: a {type(block).__name__} has no LayerNorm over the last axis, which says how many channels "
            "a projection has to take; use projections='none'"
        )
    width = norms[0].normalized_shape[0]
    stage = StageConfig(width=width, num_heads=1, num_blocks=num_blocks, num_loops=num_loops, projection_ratio=ratio)
    sizes = stored_sizes(SReTConfig(stages=(stage,)), 0)
    return [NonLinearProjection(stage, sizes) for _ in range(num_blocks * num_loops)]
