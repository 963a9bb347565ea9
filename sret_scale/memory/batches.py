"""The micro-batch as a free choice: costs at any size from two probes, the largest one that fits, the fastest one."""

from dataclasses import fields, is_dataclass
from typing import Any

from sret_scale.memory.probe import StepCosts, probe_step
from sret_scale.memory.search import Search
from sret_scale.memory.step import Device
from sret_scale.model import SReTConfig

# Larger micro-batches no longer fill a device better, and the global batch has to hold them.
MAX_MICRO_BATCH = 1024
PROBED_SIZES = (2, 4)
"""Bytes and work are affine in the micro-batch (activations grow with it, 16-bit copies of weights do not)."""


class BatchSearch:
    """The costs of a model at every micro-batch, and the choices among them."""

    def __init__(self, config: SReTConfig, precision: str, device: Device, *, repeats_norms: bool = False) -> None:
        self.device = device
        small, large = PROBED_SIZES
        self._small = probe_step(config, micro_batch_size=small, precision=precision, repeats_norms=repeats_norms)
        self._large = probe_step(config, micro_batch_size=large, precision=precision, repeats_norms=repeats_norms)
        self._searches: dict[int, Search] = {}

    def costs(self, micro_batch_size: int) -> StepCosts:
        """The costs of one micro-batch of this size."""
        small, large = PROBED_SIZES
        costs: StepCosts = _affine(self._small, self._large, (micro_batch_size - small) / (large - small))
        return costs

    def search(self, micro_batch_size: int) -> Search:
        """All schedules at this size."""
        if micro_batch_size not in self._searches:
            self._searches[micro_batch_size] = Search(self.costs(micro_batch_size), self.device)
        return self._searches[micro_batch_size]

    def largest(self, budget_bytes: int) -> int:
        """The largest micro-batch (to three binary digits) with a fitting schedule; 0 if there is none."""
        largest, step = 0, 1
        while largest + step <= MAX_MICRO_BATCH and self.search(largest + step).fastest(budget_bytes):
            largest, step = largest + step, max(1, largest + step)
        for part in (2, 4, 8):
            step = max(1, _power_below(largest) // part)
            if largest and largest + step <= MAX_MICRO_BATCH and self.search(largest + step).fastest(budget_bytes):
                largest += step
        return largest

    def fastest(self, budget_bytes: int) -> int | None:
        """The micro-batch of most modelled images per second, of powers of two and `largest`; None if none fits."""
        largest = self.largest(budget_bytes)
        rates = []
        for size in sorted({2**power for power in range(largest.bit_length())} | {largest} - {0}):
            choice = self.search(size).fastest(budget_bytes)
            if choice is not None:
                rates.append((size / choice.seconds, size))
        return max(rates)[1] if rates else None


def _power_below(number: int) -> int:
    return 1 << max(0, number.bit_length() - 1)


def _affine(low: Any, high: Any, ratio: float) -> Any:
    """`low + ratio * (high - low)` of all whole numbers in nested tuples and dataclasses."""
    if isinstance(low, int):
        return round(low + ratio * (high - low))
    if isinstance(low, tuple):
        return tuple(_affine(a, b, ratio) for a, b in zip(low, high, strict=True))
    assert is_dataclass(low) and not isinstance(low, type)
    parts = {f.name: _affine(getattr(low, f.name), getattr(high, f.name), ratio) for f in fields(low)}
    return type(low)(**parts)
