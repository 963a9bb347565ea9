"""The algebra of depth: which block, projection, slicing and branch scale each application of a stage has.

Everything here is a pure function of a config; the modules in `layers` and `stage` only carry it out.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

from sret_scale.model.config import PUBLISHED_LOOPS, BranchScheme, LoopOrder, Skip, StackConfig, StageConfig


class ResidualConstants(NamedTuple):
    """What is fixed in `stream * alpha * x + multiplier * beta * f(x)`."""

    multiplier: float
    stream: float


@dataclass(frozen=True)
class LoopPosition:
    """Where a use stands in a stage that runs other than all its loops (`plan`): the `position` of its loop among the
    `num_loops` that run, and the residual constants of a stage of so many loops."""

    position: int
    num_loops: int
    block: ResidualConstants
    projection: ResidualConstants


@dataclass(frozen=True)
class ApplicationSpec:
    """One application of a stage, before any weights: `projection` is an index into the stage's projections."""

    block: int
    loop: int
    projection: int | None
    groups: int
    permuted: bool
    place: LoopPosition | None = None

    @property
    def position(self) -> int:
        """The loop's number among those that run."""
        return self.loop if self.place is None else self.place.position


@dataclass(frozen=True)
class BranchScale:
    """A branch is `multiplier * coefficient * f(x)`; the learnable coefficient (or one a channel) starts at `init`."""

    multiplier: float
    init: float = 1.0
    per_channel: bool = False


def application_slots(config: StackConfig, index: int) -> tuple[ApplicationSpec, ...]:
    """The applications of a stage in the order in which they run."""
    stage, num_tokens = config.stages[index], config.num_tokens(index)
    # Where the config asks for exact groups they divide the tokens, and the nearest divisor is the number itself.
    groups = [nearest_divisor(num_tokens, stage.groups_of(loop)) for loop in range(stage.num_loops)]
    if stage.slices == "windows":
        groups = [num_tokens // stage.window**2] * stage.num_loops
    return tuple(
        ApplicationSpec(
            block=block,
            loop=loop,
            projection=projection_index(stage, block, loop),
            groups=groups[loop],
            # A permutation in front of attention over all tokens changes nothing, so none is drawn.
            permuted=stage.slices == "windows" or (loop >= stage.permute_from_loop and groups[loop] > 1),
        )
        for block, loop in order_of_uses(stage.loop_order, stage.num_blocks, stage.num_loops)
    )


def order_of_uses(order: LoopOrder, num_blocks: int, num_loops: int) -> list[tuple[int, int]]:
    """(block, loop) of each application in the order in which they run."""
    if order == "block":
        return list(itertools.product(range(num_blocks), range(num_loops)))
    uses = [(block, loop) for loop in range(num_loops) for block in range(num_blocks)]
    if order == "model_reversed" and num_loops > 1:
        uses[-num_blocks:] = reversed(uses[-num_blocks:])
    return uses


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of a number that is closest to the wanted one; of two, the larger."""
    if number % wanted == 0:
        return wanted
    divisors = (count for count in range(1, number + 1) if number % count == 0)
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), -divisor))


def num_projections(stage: StageConfig) -> int:
    """How many non-linear projections (NLL) a stage owns."""
    return {
        "per_application": stage.num_applications,
        "per_loop": stage.num_loops,
        "per_block": stage.num_blocks,
        "none": 0,
    }[stage.projections]


def projection_index(stage: StageConfig, block: int, loop: int) -> int | None:
    """Which of the stage's projections follows this application; None where there are none."""
    return {
        "per_application": block * stage.num_loops + loop,
        "per_loop": loop,
        "per_block": block,
        "none": None,
    }[stage.projections]


def resolved_scheme(stage: StageConfig) -> BranchScheme:
    """The scheme that `by_depth` stands for in this stage; a norm after the residual has constants of its own."""
    if stage.branch_scheme != "by_depth":
        return stage.branch_scheme
    has_norms = post_norm(stage) or stage.norm_placement == "outer"
    return "published" if stage.num_loops <= PUBLISHED_LOOPS or has_norms else "loop_aware"


def resolved_skip(stage: StageConfig) -> Skip:
    """How the coefficient of the stream is treated: "learned", "frozen" or "slow".

    A learned one is multiplied once per application: under AdamW at 1e-3 the stream of a 1000-application model grows
    46-fold in 4 steps, with it frozen 1.7-fold (architecture, section 3).
    """
    if stage.skip != "by_depth":
        return stage.skip
    return "learned" if stage.num_loops <= PUBLISHED_LOOPS else "frozen"


def branch_scales(stage: StageConfig) -> tuple[BranchScale, BranchScale]:
    """Scales of the branches in the tied blocks and in the projections, for N loops of L blocks in a stage.

    published   1: the reference's coefficients alone.
    inv_sqrt    1 / sqrt(N L): a random walk of N L untied branches keeps unit variance (as in Fixup and GPT-2).
    loop_aware  blocks 1 / (N sqrt(L)), arXiv 2606.18524: N uses of one weight add up coherently, L blocks as a random
                walk; projections 1 / (N L), unless they too are tied over the loops (`per_block`).
    layerscale  a coefficient per channel that starts at 0.1 (arXiv 2103.17239).
    rezero      a coefficient that starts at 0 (arXiv 2003.04887).
    """
    loops, blocks = stage.num_loops, stage.num_blocks
    scheme = resolved_scheme(stage)
    if scheme == "inv_sqrt":
        scale = BranchScale((loops * blocks) ** -0.5)
        return scale, scale
    if scheme == "loop_aware":
        tied = BranchScale(1.0 / (loops * blocks**0.5))
        return tied, tied if stage.projections == "per_block" else BranchScale(1.0 / (loops * blocks))
    if scheme == "layerscale":
        scale = BranchScale(1.0, init=0.1, per_channel=True)
        return scale, scale
    scale = BranchScale(1.0, init=0.0 if scheme == "rezero" else 1.0)
    return scale, scale


def post_norm(stage: StageConfig) -> tuple[float, float] | None:
    """(stream, branch) constants of a placement that normalises after the residual; None if it normalises before.

    pre       f(norm(x)), published.
    subln     pre, and a second norm in front of the branch's last linear layer (Magneto, arXiv 2210.06423).
    deepnorm  norm(a x + b f(x)) with a = (2M)^(1/4), b = (8M)^(-1/4) for M applications (arXiv 2203.00555, where b
              shrinks the initial weights instead).
    deeploop  the same with exponents 1/2: M uses of one weight add up coherently.
    outer     pre, and a norm of the stream after each application: with branches of size 1 an application is the same
              step wherever it stands, and can settle. The residuals stay as they are.
    """
    if stage.norm_placement in ("pre", "subln", "outer"):
        return None
    exponent = 0.25 if stage.norm_placement == "deepnorm" else 0.5
    return (2 * stage.num_applications) ** exponent, (8 * stage.num_applications) ** -exponent


def residual_constants(stage: StageConfig) -> tuple[ResidualConstants, ResidualConstants]:
    """Those of the residuals in the blocks and in the projections."""
    stream, branch = post_norm(stage) or (1.0, 1.0)
    block, projection = branch_scales(stage)
    return ResidualConstants(block.multiplier * branch, stream), ResidualConstants(
        projection.multiplier * branch, stream
    )


def drop_path_rates(config: StackConfig) -> tuple[tuple[float, ...], ...]:
    """Rate of stochastic depth per stage and block, as published.

    The reference spaces the rates over all applications but hands them to physical blocks, so a stage's blocks get the
    first few of its rates and the largest is never reached; projections have none.
    """
    total = config.num_applications
    rates, before = [], 0
    for stage in config.stages:
        rates.append(tuple(config.drop_path * (before + block) / total for block in range(stage.num_blocks)))
        before += stage.num_applications
    return tuple(rates)
