"""Recursion of anyone's blocks: a few modules applied many times, within the memory one asks for, in plain PyTorch."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
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
    order: "block" applies A A B B, as SReT does (arXiv 2111.05297, section 3.1); "model" A B A B.
    injection: "add" adds the input to the state before every application, which lets a tied step settle (deep
        equilibrium models, arXiv 1909.01377).
    step_size: x + step_size * (block(x) - x). At 1 nothing is computed but the block. One over the number of
        applications keeps the change of the state as it is whatever the depth (docs/depth.md says when which is right).
    norm: what the state goes through after every application, such as an `nn.LayerNorm`.
    memory: how the backward pass recomputes; a `budget_bytes` is for the activations of the recursion alone. Gradients
        are equal to those of plain PyTorch to the bit under every schedule.
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
        self.order, self.injection, self.step_size, self.norm = order, injection, step_size, norm
        self.memory = memory or MemoryConfig(schedule="none")
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
        links = [_Link(self, block, x, kwargs) for block in range(len(self.blocks))]
        state, found = x, []
        for begin, end in itertools.pairwise([0, *ends, len(plan)]):
            for is_start, part in itertools.groupby(plan[begin:end], lambda one: one[1] < loops - last):
                ours = [links[block] for block, _ in part]
                state = self._start(ours, state) if is_start else self._run(ours, state, kwargs, len(ends) + 1)
            found.append(state)
        return found

    def applications(self, num_loops: int | None = None) -> list[tuple[int, int]]:
        """(block, loop) of each application, in the order in which they run."""
        blocks, loops = range(len(self.blocks)), range(num_loops or self.num_loops)
        if self.order == "block":
            return list(itertools.product(blocks, loops))
        return [(block, loop) for loop in loops for block in blocks]

    @torch.no_grad()
    def health(self, x: Tensor, *, num_loops: int | None = None, **kwargs: Any) -> list[ApplicationHealth]:
        """What every application does to the state of this input."""
        links, found = [_Link(self, block, x, kwargs) for block in range(len(self.blocks))], []
        for block, loop in self.applications(num_loops):
            y = links[block](x)
            size, change = (float(one.float().square().mean().sqrt()) for one in (x, y - x))
            found.append(
                ApplicationHealth(block, loop, float(y.float().square().mean().sqrt()), change / (size or 1.0))
            )
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
        blocks = tuple(link.block_index for link in links)
        key = (x.shape, x.dtype, torch.is_autocast_enabled(x.device.type), blocks, num_parts, self.training)
        if key not in self._planned:
            examples = self._examples(x, kwargs)
            self._planned[key] = plan_chain([examples[block] for block in blocks], x, budget_bytes // num_parts)
        return run_chain(links, x, self._planned[key], is_checked=self.memory.is_checked)

    def _examples(self, x: Tensor, kwargs: dict[str, Any]) -> list["_Link"]:
        """Links whose tensors are leaves, for measuring."""

        def leaf(value: Any) -> Any:
            return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

        return [_Link(self, block, leaf(x), tree_map(leaf, kwargs)) for block in range(len(self.blocks))]


class _Link:
    """One block of a pass as a chain's link: the same for all its loops."""

    def __init__(self, recursion: Recursion, block_index: int, x: Tensor, kwargs: dict[str, Any]) -> None:
        self.recursion, self.block_index, self.kwargs = recursion, block_index, kwargs
        self.injected = x if recursion.injection == "add" else None

    def __call__(self, x: Tensor) -> Tensor:
        recursion, block = self.recursion, self.recursion.blocks[self.block_index]
        y = block(x if self.injected is None else x + self.injected, **self.kwargs)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"blocks.{self.block_index} ({type(block).__name__}) made {got} of {tuple(x.shape)}: a block that is "
                "applied again needs a tensor of the same shape; wrap it in a module that returns one"
            )
        if recursion.step_size != 1.0:
            y = x + recursion.step_size * (y - x)
        return y if recursion.norm is None else recursion.norm(y)

    def parameters(self) -> Iterator[Tensor]:
        """All tensors with a gradient that a call reads: weights, the injected input, arguments."""
        yield from self.recursion.blocks[self.block_index].parameters()
        if self.recursion.norm is not None:
            yield from self.recursion.norm.parameters()
        for value in tree_leaves((self.injected, self.kwargs)):
            if isinstance(value, Tensor) and value.requires_grad:
                yield value


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value
