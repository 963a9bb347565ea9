"""Recursion of anyone's blocks: a few modules applied many times, within the memory one asks for, in plain PyTorch."""

import contextlib
import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sret_scale.memory import schedule as schedules
from sret_scale.memory.config import MemoryConfig, schedule_for
from sret_scale.memory.planning.costs import measure_application
from sret_scale.memory.planning.unequal_chains import plan_chain
from sret_scale.memory.recompute import run_chain
from sret_scale.memory.schedule import Schedule
from sret_scale.model.applications import order_of_uses
from sret_scale.model.config import LoopOrder
from sret_scale.model.stage import with_value

Injection = Literal["none", "add"]


class ApplicationHealth(NamedTuple):
    """One application of a pass: root mean square of the state behind it, and of its change relative to the state
    before it. A recursion that settles changes less and less; one that grows or shrinks shows it in `rms`."""

    block: int
    loop: int
    rms: float
    relative_change: float


class Recursion(nn.Module):
    """Applies blocks again and again: `num_loops` times each, every weight registered once.

    blocks: a module, or several. Each maps a tensor to one of the same shape; keyword arguments of a call (masks,
        rotary tables, a context) go to every application, and tensors among them get their gradients.
    order: "block" applies A A B B, as SReT does (arXiv 2111.05297, section 3.1); "model" A B A B,
        "model_reversed" A B B A: the last of several rounds runs backwards.
    injection: "add" adds the input to the state before every application, which lets a tied step settle (deep
        equilibrium models, arXiv 1909.01377).
    step_size: x + step_size * (block(x) - x). At 1 nothing is computed but the block. One over the number of
        applications keeps the change of the state as it is whatever the depth (docs/depth.md says when which is right).
    norm: what the state goes through after every application, such as an `nn.LayerNorm`.
    projections: modules that are not shared: one for each application, in their order, which the state goes through
        behind it (the paper's non-linear projections). The number of loops is then fixed.
    memory: how the backward pass recomputes; a `budget_bytes` is for the activations of the recursion alone. Gradients
        are equal to those of plain PyTorch to the bit under every schedule. Dropout draws for each application from a
        seed of its own, itself drawn from torch's generator, so that it may run again.
    ValueError where a value is none of these.
    """

    def __init__(
        self,
        blocks: nn.Module | Iterable[nn.Module],
        num_loops: int,
        *,
        order: LoopOrder = "block",
        injection: Injection = "none",
        step_size: float = 1.0,
        norm: nn.Module | None = None,
        projections: Iterable[nn.Module] = (),
        memory: MemoryConfig | None = None,
    ) -> None:
        super().__init__()
        is_one = isinstance(blocks, nn.Module) and not isinstance(blocks, nn.ModuleList | nn.Sequential)
        self.blocks = nn.ModuleList([blocks] if is_one else list(blocks))  # type: ignore[arg-type, list-item]
        if not len(self.blocks):
            raise ValueError("blocks: a recursion needs at least one module, got none")
        if len({id(block) for block in self.blocks}) < len(self.blocks):
            raise ValueError("blocks: the same module stands there twice; give it once, and more loops")
        for name, value, known in (("order", order, LoopOrder), ("injection", injection, Injection)):
            if value not in get_args(known):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(known))}, got {value!r}")
        self.num_loops = _positive("num_loops", num_loops)
        if not isinstance(step_size, int | float) or not math.isfinite(step_size):
            raise ValueError(f"step_size: expected a finite number, got {step_size!r}")
        self.order, self.injection, self.step_size, self.norm = order, injection, step_size, norm
        self.projections = nn.ModuleList(projections)
        if len(self.projections) not in (0, len(self.blocks) * num_loops):
            raise ValueError(
                f"projections: expected one for each of {len(self.blocks) * num_loops} applications, got "
                f"{len(self.projections)}"
            )
        self.memory = memory or MemoryConfig(schedule="none")
        repeated = self.memory.schedule != "none" and [
            name for name, module in self.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        if repeated:
            raise ValueError(
                f"memory: {repeated[0]} updates its statistics at every run, so recomputing would count twice: use "
                "schedule='none' or norms without statistics"
            )
        self._planned: dict[tuple[object, ...], Schedule] = {}

    def forward(
        self, x: Tensor, *, num_loops: int | None = None, backprop_loops: int | None = None, **kwargs: Any
    ) -> Tensor:
        """The state after all applications.

        num_loops: another number of loops than the module's, for this pass.
        backprop_loops: how many of the last loops get a gradient. What runs before them is the start: parameters learn
            nothing there, and the gradient goes past it to the input as through a skip, x + stop_gradient(f(x)), unless
            a norm or a step size stands in the way: then it ends there.
        kwargs: go to every application.
        ValueError where a block changes the shape, or gives something else than a tensor.
        """
        *_, x = self.outputs(x, (), num_loops=num_loops, backprop_loops=backprop_loops, **kwargs)
        return x

    def outputs(
        self,
        x: Tensor,
        counts: Sequence[int],
        *,
        num_loops: int | None = None,
        backprop_loops: int | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """The states after these numbers of loops of the last block, ascending, and after all applications: what
        losses on the way are taken from. With a budget each part between two of them gets its share of it."""
        loops = self.num_loops if num_loops is None else _positive("num_loops", num_loops)
        last = loops if backprop_loops is None else _positive("backprop_loops", backprop_loops)
        plan = self.applications(loops)
        if list(counts) != sorted(set(counts)) or not all(loops - last < count < loops for count in counts):
            raise ValueError(
                f"counts: expected ascending numbers of loops from {max(loops - last, 0) + 1} to {loops - 1}, which "
                f"have a gradient, got {list(counts)}"
            )
        ends = [1 + plan.index((len(self.blocks) - 1, count - 1)) for count in counts]
        if last < loops and self.order == "block" and len(self.blocks) > 1 and not self._has_skip:
            raise ValueError(
                "backprop_loops: with order 'block' and a norm or a step size every block but the last would get no "
                "gradient; use order='model'"
            )
        links, state, found = self._links(plan, x, kwargs), x, []
        for begin, end in itertools.pairwise([0, *ends, len(plan)]):
            for is_start, part in itertools.groupby(links[begin:end], lambda link: link.loop < loops - last):
                ours = list(part)
                state = self._start(ours, state) if is_start else self._run(ours, state, kwargs, len(ends) + 1)
            found.append(state)
        return found

    def applications(self, num_loops: int | None = None) -> list[tuple[int, int]]:
        """(block, loop) of each application, in the order in which they run."""
        return order_of_uses(self.order, len(self.blocks), num_loops or self.num_loops)

    @torch.no_grad()
    def health(self, x: Tensor, *, num_loops: int | None = None, **kwargs: Any) -> list[ApplicationHealth]:
        """What every application does to the state of this input."""
        found = []
        for link in self._links(self.applications(num_loops), x, kwargs):
            y = link(x)
            before, after, change = (float(one.float().square().mean().sqrt()) for one in (x, y, y - x))
            found.append(ApplicationHealth(link.block, link.loop, after, change / (before or 1.0)))
            x = y
        return found

    def describe(self, x: Tensor, **kwargs: Any) -> dict[str, int]:
        """Applications, parameters, and what an input like x costs: multiply-adds of a forward pass, and the bytes that
        are kept for the backward pass under no recomputation and as one boundary per application."""
        examples = self._examples(x, kwargs)
        costs = [measure_application(example, x.detach()) for example in examples]
        plan = self.applications()
        return {
            "applications": len(plan),
            "parameters": sum(parameter.numel() for parameter in self.parameters()),
            "macs": sum(costs[block].flops for block, _ in plan) // 2,
            "tape_bytes": sum(costs[block].tape_bytes for block, _ in plan),
            "boundary_bytes": sum(costs[block].boundary_bytes for block, _ in plan),
        }

    @property
    def _has_skip(self) -> bool:
        return self.norm is None and self.step_size == 1.0

    def _start(self, links: Sequence["_Link"], x: Tensor) -> Tensor:
        with torch.no_grad():
            state = run_chain(links, x, schedules.none(len(links)))
        return with_value(x, state) if self._has_skip and torch.is_grad_enabled() else state

    def _run(self, links: Sequence["_Link"], x: Tensor, kwargs: dict[str, Any], num_parts: int) -> Tensor:
        budget_bytes, count = self.memory.budget_bytes, len(links)
        if budget_bytes is None or not torch.is_grad_enabled():
            return run_chain(links, x, schedules.none(count) if budget_bytes else schedule_for(self.memory, count))
        blocks = tuple(link.block for link in links)
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        tensors = [value for value in tree_leaves((x, kwargs)) if isinstance(value, Tensor)]
        shapes = tuple((one.shape, one.dtype, one.requires_grad) for one in tensors)
        key = (shapes, autocast, blocks, num_parts, self.training)
        if key not in self._planned:
            examples = self._examples(x, kwargs)
            self._planned[key] = plan_chain([examples[block] for block in blocks], x, budget_bytes // num_parts)
        return run_chain(links, x, self._planned[key], is_checked=self.memory.is_checked)

    def _examples(self, x: Tensor, kwargs: dict[str, Any]) -> list["_Link"]:
        """Links whose tensors are leaves, for measuring."""

        def leaf(value: Any) -> Any:
            return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

        plan = [(block, 0) for block in range(len(self.blocks))]
        return self._links(plan, leaf(x), tree_map(leaf, kwargs), seed=0)

    def _links(
        self, plan: Sequence[tuple[int, int]], x: Tensor, kwargs: dict[str, Any], seed: int | None = None
    ) -> list["_Link"]:
        if self.projections and len(plan) > len(self.projections):
            raise ValueError(
                f"num_loops: there are projections for {len(self.projections)} applications, got {len(plan)} to run"
            )
        drops = (module for module in self.modules() if "Drop" in type(module).__name__ and module.training)
        if not any(getattr(drop, "p", 0.0) or getattr(drop, "drop_prob", 0.0) for drop in drops):
            seed = None
        elif seed is None:
            seed = int(torch.randint(2**62, ()))
        return [_Link(self, index, *one, x, kwargs, seed) for index, one in enumerate(plan)]


class _Link:
    """One application of a pass as a chain's link."""

    def __init__(
        self,
        recursion: Recursion,
        index: int,
        block: int,
        loop: int,
        x: Tensor,
        kwargs: dict[str, Any],
        seed: int | None,
    ) -> None:
        self.recursion, self.block, self.loop, self.kwargs = recursion, block, loop, kwargs
        self.injected = x if recursion.injection == "add" else None
        self.seed = None if seed is None else seed + index
        self.modules: list[nn.Module] = [recursion.blocks[block]]
        if recursion.norm is not None:
            self.modules.append(recursion.norm)
        if recursion.projections:
            self.modules.append(recursion.projections[index])

    def __call__(self, x: Tensor) -> Tensor:
        with self._draws(x.device):
            y = self.modules[0](x if self.injected is None else x + self.injected, **self.kwargs)
            if not isinstance(y, Tensor) or y.shape != x.shape:
                got, name = (
                    tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__,
                    type(self.modules[0]).__name__,
                )
                raise ValueError(
                    f"blocks.{self.block} ({name}) made {got} of {tuple(x.shape)}: a block that is applied again needs "
                    "a tensor of the same shape; wrap it in a module that returns one"
                )
            if self.recursion.step_size != 1.0:
                y = x + self.recursion.step_size * (y - x)
            for module in self.modules[1:]:
                y = module(y)
        return y

    def parameters(self) -> Iterator[Tensor]:
        """All tensors with a gradient that a call reads: weights, the injected input, arguments."""
        for module in self.modules:
            yield from module.parameters()
        for value in tree_leaves((self.injected, self.kwargs)):
            if isinstance(value, Tensor) and value.requires_grad:
                yield value

    @property
    def context(self) -> tuple[Tensor, ...]:
        """Those of them that have a history."""
        return tuple(value for value in tree_leaves((self.injected, self.kwargs)) if _has_history(value))

    def with_context(self, context: Sequence[Tensor]) -> "_Link":
        """The same link with other tensors for its context."""
        other, given = copy.copy(self), iter(context)
        values = self.injected, self.kwargs
        other.injected, other.kwargs = tree_map(lambda value: next(given) if _has_history(value) else value, values)
        return other

    @contextlib.contextmanager
    def _draws(self, device: torch.device) -> Iterator[None]:
        """Inside, torch's generators stand where this application's own seed puts them."""
        if self.seed is None:
            yield
            return
        with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
            torch.manual_seed(self.seed)
            yield


def _has_history(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)
