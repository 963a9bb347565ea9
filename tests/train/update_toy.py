"""A toy of tied weights for the tests of the update rules, its data, and the plan of steps that they train."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sret_scale.config.run_config import ClassConfig, OptimConfig
from sret_scale.model import ParameterTag

CASES: dict[str, tuple[int | str, ...]] = {
    "adamw": (0, 1, 2, 3, "2_offload", "3_offload"),
    "lamb": (0, 1, 2, 3),
    "muon": (0,),
}
"""Rule -> the ds_configs `zeroN` that it is trained under."""
FP16_STAGES, FP16_STEPS = (0, 1, 3), 12
ACCUMULATION, WORLD, BATCH, WIDTH = 2, 2, 3, 7
BASE = OptimConfig(
    learning_rate=0.02,
    weight_decay=0.1,
    layer_decay=0.8,
    tied=ClassConfig(clip_norm=0.05),
    projection=ClassConfig(eps=1e-3, rate_ratio=2.0),
    residual=ClassConfig(rate_ratio=0.1, clip_norm=10.0),
    stem_head=ClassConfig(weight_decay=0.3),
)
COMMON_BOUND = 0.4


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """What happens in a step: the projections in use, whether rank 1's data is NaN, whether the loop rejects it."""

    projections: tuple[int, ...] = (0, 1)
    is_bad: bool = False
    is_rejected: bool = False

    @property
    def is_skipped(self) -> bool:
        return self.is_bad or self.is_rejected


PLAN = (
    PlannedStep(),
    PlannedStep(projections=(0,)),
    PlannedStep(is_bad=True),
    PlannedStep(),
    PlannedStep(is_rejected=True),
    PlannedStep(projections=(1,)),
    PlannedStep(),
)


class Toy(nn.Module):
    """A block used four times with a projection after the loops in use; odd sizes, so that two ranks cut unevenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, WIDTH)
        self.block = nn.Linear(WIDTH, WIDTH)
        self.beta = nn.Parameter(torch.full((1,), 0.5))
        self.projections = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, used: tuple[int, ...]) -> Tensor:
        x = self.stem(x)
        for loop in range(4):
            x = x + self.beta * torch.tanh(self.block(x))
            if loop in used:
                x = x + torch.tanh(self.projections[loop](x))
        return self.head(x)

    def tags(self) -> dict[str, ParameterTag]:
        kinds = {"stem": ("stem", 0), "block": ("tied", 1), "beta": ("residual", 1), "head": ("head", 2)}
        tags = {}
        for name, value in self.named_parameters():
            kind, layer = kinds.get(name.split(".")[0], ("projection", 1))
            tags[name] = ParameterTag(kind, decay=value.ndim > 1, layer=layer, num_layers=3)  # type: ignore[arg-type]
        return tags


def rate_at(step: int) -> float:
    return BASE.learning_rate / (1 + 0.1 * step)


def data(step: int, micro_step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + 10 * micro_step + rank)
    x = torch.randn(BATCH, 5, generator=generator)
    if PLAN[step].is_bad and rank == 1 and micro_step == 0:
        x[0, 0] = torch.nan
    return x, torch.randint(3, (BATCH,), generator=generator)
