"""Takes the costs of a model's training step apart without computing it: its stages' applications, and all the rest.

The model is built on the meta device and run once with fake tensors. Each stage's chain is replaced by a probe, which
measures one application of each kind and notes how much memory the rest of the model holds at that moment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sret_scale.memory.apply import set_repeated_norms
from sret_scale.memory.planning.costs import ApplicationCost, measure_application, size_bytes
from sret_scale.memory.planning.instrument import LiveBytes
from sret_scale.model import Application, Noise, StackConfig, StackModel
from sret_scale.model.depth_plan import DepthPlan
from sret_scale.model.stage import chain_of, context_of

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Costs of one micro-batch's forward and backward pass. All bytes are activations unless named otherwise.

    stages: the cost of every application of every chain; a stage is one, or several where scores are taken on the way.
    stage_of: the stage of each chain.
    held_forward, held_backward: per chain, what the rest of the model holds when the stage's pass begins; the gradient
        that comes in is the stage's.
    peaks_before: of the rest of the model before each stage, and at last in the head and the loss.
    peaks_after: of the rest of the model after the backward pass of each stage.
    """

    stages: tuple[tuple[ApplicationCost, ...], ...]
    stage_of: tuple[int, ...]
    held_forward: tuple[int, ...]
    held_backward: tuple[int, ...]
    peaks_before: tuple[int, ...]
    peaks_after: tuple[int, ...]
    launches: int
    moved_bytes: int
    parameter_bytes: int
    buffer_bytes: int
    largest_stage_parameter_bytes: int


@lru_cache(maxsize=64)
def probe_step(
    config: StackConfig,
    *,
    micro_batch_size: int,
    precision: str = "fp32",
    repeats_norms: bool = False,
    depth: DepthPlan | None = None,
) -> StepCosts:
    """The costs of training `config` on micro-batches of this size, without data and without a device.

    repeats_norms: the stem's (`apply_recomputation`). depth: which loops run, have gradient and give scores.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if micro_batch_size < 1:
        raise ValueError(f"micro-batch: expected at least 1, got {micro_batch_size}")
    with torch.device("meta"):
        model = config.build().train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        set_repeated_norms(model, repeats_norms)
        inputs = config.example(micro_batch_size)
        probe = _Probe(model)
        with probe.counter, torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
            noise = Noise(permutation_seed=0, sample_seed=0)
            scores = [model(inputs, noise)] if depth is None else model(inputs, noise, [depth])
            labels = torch.zeros_like(scores[0][:, 0], dtype=torch.int64)
            loss = torch.stack([F.cross_entropy(one.float(), labels) for one in scores]).mean()
            loss.backward()  # type: ignore[no-untyped-call]
        return probe.result()


class _Probe:
    """Stands in for the chains of a model and keeps the notes: (bytes alive, their peak since the last note)."""

    def __init__(self, model: StackModel) -> None:
        self.model = model
        self.counter = LiveBytes(model.parameters())
        self.stages: list[tuple[ApplicationCost, ...]] = []
        self.stage_of: list[int] = []
        self.used: list[set[Tensor]] = []
        self.contexts: list[int] = []
        # A chain may have an input without gradient; its backward pass is noted all the same.
        anchor = torch.empty(0, requires_grad=True)
        self.before: list[tuple[int, int]] = []  # when the forward pass of a stage begins
        self.after: list[tuple[int, int]] = []  # when its backward pass begins, last stage first
        for index, stage in enumerate(model.stages):
            stage.run_chain = chain_of(_ProbeFunction.apply, self, index, anchor)  # type: ignore[assignment]

    def note(self, notes: list[tuple[int, int]]) -> None:
        """Writes down where the counter is."""
        notes.append((self.counter.live, self.counter.peak))
        self.counter.restart_peak()

    def measure(self, applications: Sequence[Application], x_BND: Tensor) -> None:
        """Measures one application of each kind, without a trace in the counter."""
        counter = self.counter
        before = counter.peak, counter.moved, counter.launches
        costs: dict[tuple[object, ...], ApplicationCost] = {}
        for application in applications:
            kind = _kind(application)
            if kind not in costs:
                costs[kind] = measure_application(application, x_BND)
        self.stages.append(tuple(costs[_kind(application)] for application in applications))
        self.used.append({parameter for application in applications for parameter in application.parameters()})
        self.contexts.append(sum(map(size_bytes, context_of(applications))))
        counter.peak, counter.moved, counter.launches = before

    def _waiting(self, number: int) -> int:
        """Gradients that later chains gave to parameters of earlier ones too: autograd holds them for the sum."""
        later, others = (set().union(*chains) for chains in (self.used[number + 1 :], self.used[: number + 1]))
        return sum(size_bytes(parameter) for parameter in later & others)

    def _held_backward(self, waiting: list[int]) -> tuple[int, ...]:
        """What each chain finds alive, with the sums of its context's gradients, which it holds to its end."""
        rows = zip(reversed(self.after), waiting, self.contexts, strict=True)
        return tuple(live + wait + context for (live, _), wait, context in rows)

    def result(self) -> StepCosts:
        """All notes of a finished step."""
        waiting = [self._waiting(number) for number in range(len(self.stages))]
        per_stage = [sum(size_bytes(p) for p in stage.parameters()) for stage in self.model.stages]
        return StepCosts(
            stages=tuple(self.stages),
            stage_of=tuple(self.stage_of),
            held_forward=tuple(live for live, _ in self.before),
            held_backward=self._held_backward(waiting),
            peaks_before=(*(peak for _, peak in self.before), self.after[0][1]),
            peaks_after=(
                self.counter.peak,
                *(peak + wait for (_, peak), wait in zip(reversed(self.after[1:]), waiting[:-1], strict=True)),
            ),
            launches=self.counter.launches,
            moved_bytes=self.counter.moved,
            parameter_bytes=sum(size_bytes(p) for p in self.model.parameters()),
            buffer_bytes=sum(size_bytes(b) for b in self.model.buffers()),
            largest_stage_parameter_bytes=max(per_stage),
        )


class _ProbeFunction(torch.autograd.Function):
    """A chain of no cost of its own; it holds the applications, as a real chain does until its backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        probe: _Probe,
        stage: int,
        anchor: Tensor,
        applications: Sequence[Application],
        x_BND: Tensor,
        *context: Tensor,
    ) -> Tensor:
        probe.note(probe.before)
        probe.stage_of.append(stage)
        probe.measure(applications, x_BND.detach())
        ctx.probe, ctx.applications, ctx.context = probe, applications, context
        return torch.empty_like(x_BND)

    boxed_grads_call = True  # a real chain frees the gradient that comes in; its bytes are the chain's own

    @staticmethod
    def backward(ctx: Any, grads: list[Tensor] | Tensor) -> tuple[Tensor | None, ...]:
        shape = (grads.pop() if isinstance(grads, list) else grads).shape
        ctx.probe.note(ctx.probe.after)
        return None, None, None, None, torch.empty(shape), *map(torch.empty_like, ctx.context)


def _kind(application: Application) -> tuple[object, ...]:
    """Applications of one stage that agree in this cost the same."""
    return application.slot.groups, application.gather is None
