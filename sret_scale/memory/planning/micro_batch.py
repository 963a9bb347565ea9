"""The micro-batch as a free choice: the largest one that fits, the fastest one.

Candidates are compared by costs between two probes; what is chosen was probed at its own size.
"""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from sret_scale.memory.planning.probe import StepCosts, probe_step
from sret_scale.memory.planning.search import Search
from sret_scale.memory.planning.step_cost import Device
from sret_scale.model import StackConfig
from sret_scale.model.depth_plan import DepthPlan

# Larger micro-batches no longer fill a device better, and the global batch has to hold them.
MAX_MICRO_BATCH = 1024
PROBED_SIZES = (2, 4)
"""Bytes and work are nearly affine in the micro-batch: activations grow with it, gradients of weights do not. A peak is
the larger of several such sums, so beyond the probes a line lies below it, by 2.2 percent at micro-batch 8 of a toy."""


class BatchSearch:
    """The costs of a model at every micro-batch, and the choices among them."""

    def __init__(
        self,
        config: StackConfig,
        precision: str,
        device: Device,
        *,
        repeats_norms: bool = False,
        depth: DepthPlan | None = None,
    ) -> None:
        self.device = device
        self._probe = partial(probe_step, config, precision=precision, repeats_norms=repeats_norms, depth=depth)
        self._searches: dict[int, Search] = {}
        self._guesses: dict[int, Search] = {}

    @property
    def any_costs(self) -> StepCosts:
        """The costs of some micro-batch, for what does not depend on it: parameters and buffers."""
        return self.costs(PROBED_SIZES[0])

    def costs(self, micro_batch_size: int) -> StepCosts:
        """The costs of one micro-batch of this size."""
        return self._probe(micro_batch_size=micro_batch_size)

    def search(self, micro_batch_size: int) -> Search:
        """All schedules at this size."""
        if micro_batch_size not in self._searches:
            self._searches[micro_batch_size] = Search(self.costs(micro_batch_size), self.device)
        return self._searches[micro_batch_size]

    def largest(self, budget_bytes: int) -> int:
        """The largest micro-batch (to three binary digits) with a fitting schedule; 0 if there is none."""
        largest, step = 0, 1
        while largest + step <= MAX_MICRO_BATCH and self._guess(largest + step).fastest(budget_bytes):
            largest, step = largest + step, max(1, largest + step)
        for part in (2, 4, 8):
            step = max(1, _power_below(largest) // part)
            if largest and largest + step <= MAX_MICRO_BATCH and self._guess(largest + step).fastest(budget_bytes):
                largest += step
        while largest and self.search(largest).fastest(budget_bytes) is None:
            largest -= max(1, _power_below(largest) // 8)
        return largest

    def fastest(self, budget_bytes: int, sizes: Sequence[int] = ()) -> int | None:
        """The micro-batch of most modelled images per second; None if none fits.

        sizes: those to choose from; by default powers of two and `largest`.
        """
        if not sizes:
            largest = self.largest(budget_bytes)
            sizes = sorted({2**power for power in range(largest.bit_length())} | {largest} - {0})
        rates = []
        for size in sizes:
            choice = self._guess(size).fastest(budget_bytes)
            if choice is not None:
                rates.append((size / choice.seconds, size))
        fitting = (size for _, size in sorted(rates, reverse=True) if self.search(size).fastest(budget_bytes))
        return next(fitting, None)

    def _guess(self, micro_batch_size: int) -> Search:
        """All schedules at this size, nearly, without a probe of it."""
        small, large = PROBED_SIZES
        if micro_batch_size not in self._guesses:
            ratio = (micro_batch_size - small) / (large - small)
            self._guesses[micro_batch_size] = Search(_affine(self.costs(small), self.costs(large), ratio), self.device)
        return self._guesses[micro_batch_size]


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
