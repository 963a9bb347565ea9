"""Bytes that a rank holds from step to step: parameters, gradients, optimiser state and DeepSpeed's buckets."""

import re
from dataclasses import dataclass

from sret_scale.memory.planning.probe import StepCosts

BUCKET_BYTES = 2 * 20_000_000 * 4
"""The reduce and the gather bucket of ds_configs."""


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """All in fp32."""

    parameters: int
    gradients: int
    optimizer: int
    buckets: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.parameters + self.gradients + self.optimizer + self.buckets


def state_bytes(costs: StepCosts, *, world_size: int, zero_stage: int) -> StateBytes:
    """The state of one of `world_size` ranks with Adam: two moments, and under ZeRO a copy of the rank's parameters.

    At ZeRO 3 one stage of the model is gathered at a time.
    """
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"zero stage: expected 0, 1, 2 or 3, got {zero_stage}")
    if world_size < 1:
        raise ValueError(f"world size: expected at least 1, got {world_size}")
    whole, part = costs.parameter_bytes, -(-costs.parameter_bytes // world_size)
    return StateBytes(
        parameters=costs.buffer_bytes + (part + costs.largest_stage_parameter_bytes if zero_stage == 3 else whole),
        gradients=part if zero_stage >= 2 else whole,
        optimizer=2 * whole if zero_stage == 0 else 3 * part,
        buckets=BUCKET_BYTES if zero_stage else 0,
    )


def format_bytes(count: int) -> str:
    """A size in the unit that suits it."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def parse_bytes(text: str, name: str = "size") -> int:
    """Bytes of a size such as `80GiB`, `80GB` or `80G`, which is GiB as Slurm takes it; only 0 needs no unit.

    ValueError, with the `name` of the setting, for anything else.
    """
    binary = {f"{prefix}{end}": 2 ** (10 * power) for power, prefix in enumerate("KMGT", 1) for end in ("", "iB")}
    units = {**binary, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}
    if text.strip() == "0":
        return 0
    match = re.fullmatch(rf"(\d+(?:\.\d+)?(?:e\d\d?)?)\s*({'|'.join(units)})", text.strip())
    if not match:
        raise ValueError(f"{name}: expected a size such as 80G, 80GB or 80GiB, got {text!r}")
    return int(float(match[1]) * units[match[2]])
