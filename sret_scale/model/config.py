"""What a recursive model is made of: one frozen dataclass a stage, and one for the whole model of each kind.

A config that cannot be built raises `ValueError` at construction, with the numbers that disagree.
"""

import abc
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sret_scale.model.stack import StackModel
    from sret_scale.model.vision.sret import SReT

LoopOrder = Literal["block", "model", "model_reversed"]
ProjectionPolicy = Literal["per_application", "per_loop", "per_block", "none"]
BranchScheme = Literal["by_depth", "published", "inv_sqrt", "loop_aware", "layerscale", "rezero"]
Skip = Literal["by_depth", "learned", "frozen", "slow"]
NormPlacement = Literal["pre", "subln", "deepnorm", "deeploop", "outer"]
ConditioningKind = Literal[
    "none", "norm_per_loop", "norm_by_depth", "low_rank", "input_add", "input_gated", "input_tied"
]
Slices = Literal["raster", "windows"]
PermutationPolicy = Literal["fixed", "random", "strided"]
GroupFit = Literal["exact", "nearest"]
StemKind = Literal["convolutions", "pixels"]
StemNorm = Literal["batch", "sync_batch", "group", "layer"]
Positions = Literal["learned", "none"]
Head = Literal["classes", "tokens"]

# The reference has two loops; schemes named `by_depth` keep its choice up to there.
PUBLISHED_LOOPS = 2


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One resolution level: `num_blocks` sets of weights, each applied `num_loops` times.

    width, num_heads: channels of a token, cut into heads.
    num_blocks, num_loops: sets of weights, and how often each is applied.
    loop_order: "block" applies A A B B (published), "model" A B A B, "model_reversed" A B B A: the last of
        several rounds runs backwards (CYCLE (REV) of arXiv 2104.06022).
    groups: number of slices of the tokens per loop; the last entry holds for all later loops.
    slices: "raster" cuts the tokens in the image's order, or in a drawn one, into `groups` (published); "windows" cuts
        the image into squares of `window` x `window` tokens, shifted by half a window in every second application, and
        learns a bias between the places of a window (as in Swin, arXiv 2103.14030).
    window: side of a window in tokens.
    mlp_ratio, projection_ratio: hidden channels of a feed-forward, and of a projection, relative to the width.
    permute_from_loop: loops from this one on draw a permutation before slicing (published: 1).
    projections: which applications share a non-linear projection; "per_application" is published.
    branch_scheme: fixed multiplier of each branch, see `depth.branch_scales`; "by_depth" is "published" up to two loops
        and "loop_aware" beyond.
    skip: the coefficient of the stream itself is "learned" (published), "frozen" at 1, or "slow": learned at the
        learning rate divided by the stage's applications. "by_depth" is "learned" up to two loops, then "frozen".
    norm_placement: where the LayerNorms of a residual sub-layer are, see `depth.post_norm`; "pre" is published.
    conditioning: what tells a block its loop, see `conditioning`.
    conditioning_rank: of "low_rank".
    """

    width: int
    num_heads: int
    num_blocks: int
    num_loops: int = PUBLISHED_LOOPS
    loop_order: LoopOrder = "block"
    groups: tuple[int, ...] = (1,)
    slices: Slices = "raster"
    window: int = 3
    permute_from_loop: int = 1
    mlp_ratio: float = 4.0
    projections: ProjectionPolicy = "per_application"
    projection_ratio: float = 1.0
    branch_scheme: BranchScheme = "by_depth"
    skip: Skip = "by_depth"
    norm_placement: NormPlacement = "pre"
    conditioning: ConditioningKind = "none"
    conditioning_rank: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", require_list("groups", self.groups))
        for name in ("width", "num_heads", "num_blocks", "num_loops", "conditioning_rank", "window"):
            require_positive(name, getattr(self, name))
        if not self.groups:
            raise ValueError("groups is empty: give one number of slices per loop, for example (8, 2)")
        for groups in self.groups:
            require_positive("groups", groups)
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} cannot be cut into {self.num_heads} heads: {self.width} % "
                f"{self.num_heads} = {self.width % self.num_heads}"
            )
        for name in ("mlp_ratio", "projection_ratio"):
            require_number(name, getattr(self, name))
            if int(getattr(self, name) * self.width) < 1:
                raise ValueError(f"{name} {getattr(self, name)} leaves no hidden channel at width {self.width}")
        # Far beyond what anybody trains; what a file says must not decide how long or large a loop over it gets.
        require_positive("num_blocks x num_loops", self.num_blocks * self.num_loops)
        for name in ("mlp_ratio", "projection_ratio"):
            require_positive(f"{name} x width", int(getattr(self, name) * self.width), 1 << 20)
        require_whole("permute_from_loop", self.permute_from_loop)
        if self.permute_from_loop < 0:
            raise ValueError(f"permute_from_loop must be 0 or more, got {self.permute_from_loop}")
        if self.slices == "windows" and (self.window < 2 or self.groups != (1,)):
            raise ValueError(
                f"slices 'windows' takes a window of 2 or more in place of groups, got window {self.window!r} and "
                f"groups {self.groups}"
            )
        require_choices(self)

    @property
    def num_applications(self) -> int:
        """Uses of a block in this stage: its depth."""
        return self.num_blocks * self.num_loops

    @property
    def hidden_width(self) -> int:
        """Hidden channels of a block's feed-forward (rounded down, as published)."""
        return int(self.mlp_ratio * self.width)

    @property
    def projection_hidden_width(self) -> int:
        """Hidden channels of a non-linear projection."""
        return int(self.projection_ratio * self.width)

    def groups_of(self, loop: int) -> int:
        """Number of token slices in this loop."""
        return self.groups[min(loop, len(self.groups) - 1)]


@dataclass(frozen=True, kw_only=True)
class StackConfig(abc.ABC):
    """What recursion asks of any model: its stages, and what all of them share. A kind of model adds its own.

    kind: tells the kinds of models apart.
    drop_path: the largest rate of stochastic depth, reached as published (`depth.drop_path_rates`).
    dropout: rate behind the position tensor, the hidden layers and the branches, as in the reference (0 as published).
    permutation: "fixed" uses a table seeded by `permutation_seed` in evaluation and the step's seed in training;
        "random" draws anew from torch's global generator in every forward pass, as the reference does; "strided" draws
        nothing: of g groups, a slice has every g-th token.
    permutation_seed: of the fixed permutations in evaluation.
    group_fit: where a number of groups does not divide a stage's tokens, "exact" refuses the config and "nearest" takes
        the closest number that does (the larger of two).
    padded: store widths, heads and hidden sizes as multiples of 8 for a GPU's matrix units, with zeros that stay zero
        (`padding`); what the model computes and its exported weights are the same.
    """

    is_causal: ClassVar[bool] = False
    """Whether a token sees those before it alone."""

    kind: str
    stages: tuple[StageConfig, ...]
    drop_path: float = 0.0
    dropout: float = 0.0
    permutation: PermutationPolicy = "fixed"
    permutation_seed: int = 0
    group_fit: GroupFit = "exact"
    padded: bool = False

    def __post_init__(self) -> None:
        kind = next(field.default for field in fields(self) if field.name == "kind")
        if self.kind != kind:
            raise ValueError(f"kind must be {kind!r} here, got {ascii(self.kind)[:40]}")
        object.__setattr__(self, "stages", require_list("stages", self.stages))
        if not isinstance(self.padded, bool):
            raise ValueError(f"padded must be true or false, got {self.padded!r}")
        if not self.stages:
            raise ValueError("a model needs at least one stage")
        for stage in self.stages:
            if not isinstance(stage, StageConfig):
                raise ValueError(f"stages must be a list of StageConfig, got {stage!r} in it")
        require_whole("permutation_seed", self.permutation_seed)
        for name in ("drop_path", "dropout"):
            require_number(name, getattr(self, name))
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        require_choices(self)

    @abc.abstractmethod
    def num_tokens(self, index: int) -> int:
        """Tokens of a sample in stage `index`."""

    def has_memory(self, index: int) -> bool:
        """Whether the tokens of stage `index` attend to a memory too."""
        return False

    @abc.abstractmethod
    def example(self, micro_batch_size: int) -> Tensor:
        """An input of the model, without meaning, for those who measure what a step takes."""

    @property
    @abc.abstractmethod
    def sample_size(self) -> dict[str, int]:
        """How large a sample is, as the loader calls it."""

    @abc.abstractmethod
    def build(self) -> "StackModel":
        """The model, its weights drawn from torch's global generator."""

    def measured_macs(self) -> int | None:
        """Multiply-adds of a sample's pass where they are counted in one; None where they follow from this config."""
        return None

    @property
    def num_applications(self) -> int:
        """Depth: uses of a block in the whole model."""
        return sum(stage.num_applications for stage in self.stages)


@dataclass(frozen=True, kw_only=True)
class ImageConfig(StackConfig):
    """What models of images share.

    image_size, in_channels: side of the square input in pixels, and its colours.
    num_classes: those of the training set; `auto` takes them from it.
    head: scores of "classes" from the mean of the last tokens (published), or of each of the last "tokens".
    """

    image_size: int = 224
    in_channels: int = 3
    num_classes: int = 1000
    head: Head = "classes"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("image_size", 1 << 14), ("in_channels", 1 << 10), ("num_classes", 1 << 24)):
            require_positive(name, getattr(self, name), most)

    def example(self, micro_batch_size: int) -> Tensor:
        """(B, C, H, W) images."""
        return torch.zeros(micro_batch_size, self.in_channels, self.image_size, self.image_size)

    @property
    def sample_size(self) -> dict[str, int]:
        """See `StackConfig.sample_size`."""
        return {"image_size": self.image_size}


@dataclass(frozen=True, kw_only=True)
class SReTConfig(ImageConfig):
    """A model of images. A pooling halves the grid between stages.

    stem_strides: of the three stem convolutions.
    stem: three "convolutions" (published), or a linear layer of single "pixels", whose strides are 1.
    stem_norm: "batch" is published; "sync_batch" takes its moments over all ranks (see `stem.SyncBatchNorm`).
    positions: a "learned" tensor is added to the first tokens (published), or "none", which serves any image size.
    """

    kind: Literal["vision"] = "vision"
    stem_strides: tuple[int, int, int] = (2, 2, 2)
    stem: StemKind = "convolutions"
    stem_norm: StemNorm = "batch"
    positions: Positions = "learned"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "stem_strides", require_list("stem_strides", self.stem_strides))
        if self.stages[0].width % 2:
            raise ValueError(f"the first stage's width must be even for the stem, got {self.stages[0].width}")
        for stride in self.stem_strides:
            require_whole("stem_strides", stride)
        if len(self.stem_strides) != 3 or not set(self.stem_strides) <= {1, 2}:
            raise ValueError(f"stem_strides must be three of 1 or 2, got {self.stem_strides}")
        if self.stem == "pixels" and self.stem_strides != (1, 1, 1):
            raise ValueError(f"stem 'pixels' needs stem_strides (1, 1, 1), got {self.stem_strides}")
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if after.width % before.width:
                raise ValueError(
                    f"stage widths must be multiples of the one before (depthwise pooling): "
                    f"{before.width} -> {after.width}"
                )
        if self.group_fit == "exact":
            self._require_divisible_grids()

    def num_tokens(self, index: int) -> int:
        """Tokens on the grid of stage `index`; with windows the padding counts."""
        stage, grid = self.stages[index], self.grids[index]
        return (padded_side(grid, stage.window) if stage.slices == "windows" else grid) ** 2

    def build(self) -> "SReT":
        """The model; see `StackConfig.build`."""
        from sret_scale.model.vision.sret import SReT

        return SReT(self)

    def _require_divisible_grids(self) -> None:
        wrong = self._undivided(self.image_size)
        if wrong is not None:
            index, groups, grid = wrong
            num_tokens = grid * grid
            divisors = [count for count in range(1, num_tokens + 1) if num_tokens % count == 0]
            nearby = range(max(1, self.image_size // 2), 2 * self.image_size + 1)
            step = 2 ** (self.stem_strides.count(2) + len(self.stages) - 1)
            sizes = [size for size in nearby if size % step == 0 and self._undivided(size) is None]
            raise ValueError(
                f"stage {index}: {groups} groups do not divide {num_tokens} tokens ({grid} x {grid} at image size "
                f"{self.image_size}); group counts that do: {divisors}; image sizes that do: {sizes or 'none nearby'}"
            )

    def _undivided(self, image_size: int) -> tuple[int, int, int] | None:
        """The first (stage, groups, grid) whose groups do not divide the tokens at this image size."""
        for index, (stage, grid) in enumerate(zip(self.stages, self.grids_at(image_size), strict=True)):
            for groups in stage.groups[: stage.num_loops]:
                if grid * grid % groups:
                    return index, groups, grid
        return None

    def grids_at(self, image_size: int) -> tuple[int, ...]:
        """Side of every stage's token grid. A stride of 2 rounds up, as a padded 3 x 3 convolution does."""
        side = image_size
        for stride in self.stem_strides:
            side = -(-side // stride)
        sides = []
        for _ in self.stages:
            sides.append(side)
            side = -(-side // 2)
        return tuple(sides)

    @property
    def grids(self) -> tuple[int, ...]:
        """Side of every stage's token grid at the configured image size."""
        return self.grids_at(self.image_size)


def padded_side(grid: int, window: int) -> int:
    """Side of the padded grid: the least multiple of the window that leaves room for a shift by half a window."""
    return window * -(-(grid + window // 2) // window)


def require_positive(name: str, value: object, most: int = 1 << 16) -> None:
    """ValueError unless the value is an int of at least 1, and at most `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        bound = "at least 1" if not isinstance(value, int) or value <= most else f"at most {most}"
        raise ValueError(f"{name} must be a whole number of {bound}, got {ascii(value)[:40]}")


def require_whole(name: str, value: object) -> None:
    """ValueError unless the value is an int."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}")


def require_number(name: str, value: object) -> None:
    """ValueError unless the value is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {value!r}")


def require_list(name: str, value: object) -> tuple[Any, ...]:
    """The value as a tuple; ValueError unless it is a list or one already."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list, got {value!r}")
    return tuple(value)


def require_choices(config: "StageConfig | StackConfig") -> None:
    """ValueError unless every field of a Literal type is one of its choices."""
    for field in fields(config):
        choices, value = get_args(field.type), getattr(config, field.name)
        if get_origin(field.type) is Literal and value not in choices:
            raise ValueError(f"{field.name} must be one of {', '.join(choices)}; got {value!r}")
