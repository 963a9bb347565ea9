"""Runs a chain of applications under a schedule, as one autograd function.

One function a chain means one gradient per parameter and step, whatever the number of its uses: the hooks of every ZeRO
stage fire once. There are no saved-tensor hooks; boundaries live in the function's own slots and are freed one by one.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge

from sret_scale.memory.gradients import Exit, GradientSums, entered
from sret_scale.memory.schedule import Action, Kind, Schedule
from sret_scale.memory.slots import DeviceSlots, HostSlots, Slots, require_unchanged


class Chained(Protocol):
    """One link of a chain, such as an `nn.Module`: maps a tensor to a new tensor, with the same bits at every run.

    Tensors that it reads and that are neither its input nor leaves are its `context`, if it has that attribute; they
    are among its parameters, and `with_context(tensors)` gives the same link with others in their place.
    """

    def __call__(self, x: Tensor, /) -> Tensor: ...

    def parameters(self) -> Iterable[Tensor]:
        """All parameters that the call uses."""


def call_link(application: Chained, given: list[Tensor]) -> Tensor:
    """The output of an application for the input that is alone in `given`, which is emptied.

    Python holds the arguments of a call to its end. A link with a true `is_boxed` takes the list instead, so that an
    input that it has only reordered is free while it runs.
    """
    return application(given if is_boxed(application) else given.pop())  # type: ignore[arg-type]


def is_boxed(application: Chained) -> bool:
    """Whether the application takes its input in a list."""
    return getattr(application, "is_boxed", False)


def detached(applications: Sequence[Chained]) -> tuple[list[Chained], dict[Tensor, Tensor]]:
    """The applications with leaves in the place of their context, and the tensor that each leaf stands for.

    The history of a context may lead to parameters that the applications use too. Where a leaf stands for it, their
    gradients end at it, and what lies behind is propagated once, when the chain has returned its sum.
    """
    leaf_of: dict[Tensor, Tensor] = {}
    found: list[Any] = list(applications)
    for index, application in enumerate(found):
        if context := getattr(application, "context", ()):
            for tensor in context:
                leaf_of.setdefault(tensor, tensor.detach().requires_grad_(tensor.requires_grad))
            found[index] = application.with_context(tuple(leaf_of[tensor] for tensor in context))
    return found, {leaf: tensor for tensor, leaf in leaf_of.items()}


def run_chain(
    applications: Sequence[Chained],
    x: Tensor,
    schedule: Schedule,
    *,
    is_checked: bool = False,
    is_offloaded: bool = False,
) -> Tensor:
    """The output of the applications one after another, with gradients equal to plain autograd's bit for bit.

    The autocast state of this call (weight cache off) holds for all runs of the applications. ValueError if an
    application changes its input in place or, when it is run again, returns another shape or type, or other values
    because it draws from torch's global generators; with `is_checked` also if it returns other values for any other
    reason, at the price of one pass over each boundary. With `is_offloaded` boundaries wait in the host's memory.
    """
    if schedule.num_applications != len(applications):
        raise ValueError(
            f"schedule: expected one for {len(applications)} applications, got {schedule.num_applications}"
        )
    if not torch.is_grad_enabled():
        for application in applications:
            x = application(x)
        return x
    slots = HostSlots(x.device) if is_offloaded else DeviceSlots()
    chain = _Chain(applications, schedule, slots, is_checked=is_checked, device_type=x.device.type)
    return _ChainFunction.apply(chain, x, *chain.inputs)  # type: ignore[no-untyped-call]


class _Drawn:
    """Where torch's global generators stand, to see whether somebody draws from them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host, self._place = self._now()

    def has_changed(self) -> bool:
        """Whether anything was drawn since."""
        host, place = self._now()
        return place != self._place or not torch.equal(host, self._host)

    def _now(self) -> tuple[Tensor, int]:
        generators = torch.cuda.default_generators if self._device.type == "cuda" else ()
        # The host knows the place in a GPU's stream: nobody waits for the GPU.
        return torch.get_rng_state(), generators[self._device.index].get_offset() if generators else 0


class _Mark(NamedTuple):
    """What every run of an application has to reproduce."""

    shape: torch.Size
    dtype: torch.dtype
    digest: int | None


class _Chain:
    """One forward and backward pass of a chain: its slots, the state in hand and the tape."""

    def __init__(
        self,
        applications: Sequence[Chained],
        schedule: Schedule,
        slots: Slots,
        *,
        is_checked: bool,
        device_type: str,
    ) -> None:
        self.applications, origins = detached(applications)
        self.schedule = schedule
        self.is_checked = is_checked
        index_of: dict[Tensor, int] = {}
        self.used = [[index_of.setdefault(p, len(index_of)) for p in a.parameters()] for a in self.applications]
        self.parameters = tuple(index_of)
        self.inputs = tuple(origins.get(p, p) for p in self.parameters)
        self.autocast: Callable[[], torch.autocast] = _current_autocast(device_type)
        self.marks: list[_Mark | None] = [None] * len(applications)
        self.slots = slots
        self.takes = deque(action.lo for action in schedule.backward if action.kind is Kind.TAKE)
        self.hand: Tensor | None = None
        self.hand_version = 0  # of what is in hand between the passes
        self.tape: list[tuple[GradientEdge | None, Exit | None]] = []
        self.is_input_differentiable = False

    def forward(self, x: Tensor) -> Tensor:
        """The chain's output, without a gradient function."""
        self.is_input_differentiable = x.requires_grad
        self.hand = x.detach()
        output: Tensor | None = None
        for action in self.schedule.forward:
            result = self._perform(action)
            if action.hi == len(self.applications) and action.kind is not Kind.ADVANCE:
                output = result
        assert output is not None
        if self.hand is not None:
            self.hand_version = self.hand._version
        return output.detach()

    def backward(self, grad_output: list[Tensor]) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of the chain's input and of each parameter; `grad_output` holds one, which is taken out."""
        if self.hand is not None:
            require_unchanged(self.hand, self.hand_version)
        sums = GradientSums(self.parameters)
        gradient = grad_output
        for action in self.schedule.backward:
            if action.kind is Kind.BACK:
                for index in reversed(range(action.lo, action.hi)):
                    gradient = self._back(index, gradient, sums)
            else:
                self._perform(action)
        return gradient.pop() if gradient else None, sums.totals()

    def _perform(self, action: Action) -> Tensor | None:
        """Does one action (BACK excepted); returns what running the applications gave, if any ran."""
        kind, lo, hi = action
        if kind is Kind.TAKE:
            self.hand = self.slots.take(self.takes.popleft())
            if self.takes:
                self.slots.prefetch(self.takes[0])
            return None
        assert self.hand is not None
        if kind is Kind.KEEP:
            self.slots.put(lo, self.hand)
            return None
        if kind is Kind.TAPE:
            return self._tape(lo, hi, self._release())
        with torch.no_grad(), self.autocast():
            if kind is Kind.OUTPUT:
                return self._run(lo, hi, [self.hand])
            self.hand = self._run(lo, hi, self._release())
            return self.hand

    def _release(self) -> list[Tensor]:
        """What was in hand, alone in a list: whoever runs from it takes it out and can let it go."""
        assert self.hand is not None
        hand, self.hand = self.hand, None
        return [hand]

    def _tape(self, lo: int, hi: int, given: list[Tensor]) -> Tensor:
        """Tapes each application by itself, so that the gradients of one are summed before the next one's arise."""
        with torch.enable_grad(), self.autocast():
            for index in range(lo, hi):
                entry = None
                if index > 0 or self.is_input_differentiable:
                    own, entry = entered(given.pop())
                    given.append(own)
                    del own
                x = self._run(index, index + 1, given)
                self.tape.append((entry, Exit(x) if x.requires_grad else None))
                given = [x]
                del x
        return given[0]

    def _back(self, index: int, gradient: list[Tensor], sums: GradientSums) -> list[Tensor]:
        """The gradient of an application's input from that of its output, each alone in a list or in none."""
        entry, end = self.tape.pop()
        if not gradient or end is None:
            return []
        found = sums.backward(end, gradient, entry, self._trainable(index))
        return [] if found is None else [found]

    def _run(self, lo: int, hi: int, given: list[Tensor]) -> Tensor:
        """The output of [lo, hi) for the input in `given`, which is emptied; no boundary between is held."""
        for index in range(lo, hi):
            before, version = weakref.ref(given[0]), given[0]._version
            application, expected = self.applications[index], self.marks[index]
            # A boxed link promises that it draws nothing; of any other, the call holds the input anyway.
            held = None if expected is None or is_boxed(application) else given[0]
            drawn = None if held is None else _Drawn(held.device)
            y = call_link(application, given)
            x = before()
            if x is not None and x._version != version:  # one that is gone can mislead nobody
                raise ValueError(f"application {index} of the chain changed its input in place: return a new tensor")
            if held is not None and drawn is not None and drawn.has_changed():
                self._require_repeatable(index, held, y)
            del x, held
            mark = _Mark(y.shape, y.dtype, _digest(y) if self.is_checked else None)
            if expected is not None and expected != mark:
                raise ValueError(
                    f"application {index} of the chain returned {_describe(mark)} when it was run again, and"
                    f" {_describe(expected)} at first: its result must depend on its input and parameters alone"
                )
            self.marks[index] = mark
            given = [y]
            del y
        return given[0]

    def _require_repeatable(self, index: int, x: Tensor, y: Tensor) -> None:
        """Runs an application once more; ValueError if it gives other values. Another thread may have drawn instead."""
        with torch.no_grad():
            is_same = torch.equal(self.applications[index](x), y)
        if not is_same:
            raise ValueError(
                f"application {index} of the chain gives other values each time it runs, because it draws from torch's"
                " global generator (dropout does): draw from a generator whose seed is a function of the application,"
                " or use a schedule that runs nothing again"
            )

    def _trainable(self, index: int) -> list[int]:
        return [k for k in dict.fromkeys(self.used[index]) if self.parameters[k].requires_grad]


class _ChainFunction(torch.autograd.Function):
    """The door between autograd and a chain; the parameters are inputs so that their gradients go the usual way."""

    @staticmethod
    def forward(ctx: Any, chain: _Chain, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.chain = chain
        return chain.forward(x)

    # The gradient comes in a list, out of which it is freed when the last application has read it. A torch that does
    # not know this passes the gradient itself.
    boxed_grads_call = True

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: list[Tensor] | Tensor) -> tuple[Tensor | None, ...]:
        if ctx.chain is None:
            raise ValueError("this chain has been propagated through already: run the forward pass again")
        chain, ctx.chain = ctx.chain, None
        grad_input, grad_parameters = chain.backward(grads if isinstance(grads, list) else [grads])
        return None, grad_input, *grad_parameters


def _current_autocast(device_type: str) -> Callable[[], torch.autocast]:
    """Makes contexts with the autocast state of now, weight cache off: a cached cast would join the runs' graphs."""
    is_enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=is_enabled, cache_enabled=False)


def _digest(x: Tensor) -> int:
    """A number that depends on every bit of a floating tensor and on its order."""
    bits = x.detach().contiguous().view(torch.uint8).flatten().to(torch.int64)
    weights = torch.arange(bits.numel(), device=bits.device) * 2 + 1
    return int((bits * weights).sum() + bits.square().sum())


def _describe(mark: _Mark) -> str:
    values = "" if mark.digest is None else f" with digest {mark.digest & 0xFFFFFFFF:08x}"
    return f"{tuple(mark.shape)} {str(mark.dtype).removeprefix('torch.')}{values}"
