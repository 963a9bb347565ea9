"""The number formats of a run: the autocast of a precision, and the loss scale that fp16 needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]

INITIAL_SCALE = 2.0**16
GROWTH_STEPS = 2000


def autocast(device_type: str, precision: Precision) -> torch.autocast:
    """A context in which matrix products are computed in `precision`; parameters are fp32 in all."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device_type, dtype=dtype, enabled=precision != "fp32")


@dataclass(kw_only=True)
class LossScale:
    """The factor of the loss that keeps small gradients from vanishing in fp16 (Micikevicius et al., arXiv 1710.03740).

    Halved when a gradient overflows, doubled after `GROWTH_STEPS` updates without; equal on all ranks, as what decides
    on it is. DeepSpeed 0.19.8 has torch's scaler ask each parameter group and each rank for itself: they would differ.
    """

    value: float = INITIAL_SCALE
    num_good: int = 0
    """Updates since the last change."""

    def update(self, is_finite: bool) -> None:
        """Take in whether the scaled gradient was finite."""
        self.num_good = self.num_good + 1 if is_finite else 0
        if not is_finite:
            self.value = max(1.0, self.value / 2)
        elif self.num_good == GROWTH_STEPS:
            self.value, self.num_good = self.value * 2, 0

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"value": self.value, "num_good": self.num_good}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `to_json` gave."""
        self.value, self.num_good = float(state["value"]), int(state["num_good"])
