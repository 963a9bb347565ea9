"""Adds a step up: the activation bytes and the modelled time of one micro-batch under a schedule for each stage."""

from collections.abc import Sequence
from dataclasses import dataclass

from sret_scale.memory.planning.costs import ApplicationCost
from sret_scale.memory.planning.predict import ChainBytes
from sret_scale.memory.planning.probe import StepCosts


def step_peak_bytes(costs: StepCosts, chains: Sequence[ChainBytes]) -> int:
    """The most activation bytes alive at once in a forward and backward pass."""
    resting, peaks = 0, []
    for index, chain in enumerate(chains):
        peaks.append(resting + stage_peak_bytes(costs, index, chain))
        resting += chain.resting_bytes
    return max(*peaks, costs.peaks_before[-1] + resting)


def stage_peak_bytes(costs: StepCosts, index: int, chain: ChainBytes) -> int:
    """The peak in and around the passes of one stage, without what earlier stages hold at rest."""
    input_bytes = costs.stages[index][0].boundary_bytes  # the caller holds it too while the forward pass runs
    return max(
        costs.peaks_before[index],
        costs.held_forward[index] + chain.forward_peak - input_bytes,
        costs.held_backward[index] + chain.backward_peak,
        costs.peaks_after[index],
    )


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a device can do, for ranking plans: a roofline with a price per launched operator. No promise of speed."""

    bytes_per_s: float
    flops_per_s: float
    launch_s: float


DEVICES = {
    "gpu": Device(bytes_per_s=3e12, flops_per_s=3e14, launch_s=6e-6),
    "cpu": Device(bytes_per_s=1e10, flops_per_s=5e10, launch_s=1e-5),
}
"""Orders of magnitude: an H100-class GPU in bf16, launched eagerly, and one core of a server CPU in fp32."""

# A backward run costs about two forward runs: each product has two gradients.
TAPED_RUNS = 3


def application_seconds(cost: ApplicationCost, device: Device) -> float:
    """Modelled time of one forward run."""
    return max(cost.launches * device.launch_s, cost.moved_bytes / device.bytes_per_s, cost.flops / device.flops_per_s)


def outside_seconds(costs: StepCosts, device: Device) -> float:
    """Modelled time of everything but the chains."""
    return max(costs.launches * device.launch_s, costs.moved_bytes / device.bytes_per_s)
