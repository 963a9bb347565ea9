"""A stage of the model: turns its config into a chain of applications and runs it.

The chain is a list of callables that share blocks, so whoever wants to run it in another way (recomputation, a captured
graph) replaces `Stage.run_chain` from outside; the stage knows nothing of it.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from sret_scale.model.applications import ApplicationSpec, application_slots, drop_path_rates, num_projections
from sret_scale.model.conditioning import InputInjection
from sret_scale.model.config import SReTConfig, StackConfig
from sret_scale.model.cross_attention import Sight
from sret_scale.model.depth_plan import DepthPlan, planned_rates, planned_slots
from sret_scale.model.layers import Block, NonLinearProjection
from sret_scale.model.noise import Dropout, Noise, PermutationSource, drop_path_masks
from sret_scale.model.permutation import TokenOrder, as_index, ascending_slices, reorder_tokens, strided_order
from sret_scale.model.stored_sizes import stored_sizes
from sret_scale.model.upload import uploaded
from sret_scale.model.windows import WindowOrder


@dataclass(frozen=True, eq=False)
class Application:
    """One use of a block with its projection: (B, N, D) fp32 stream in, fp32 stream out.

    Everything random was drawn when the chain was built, so calling it again on the same input gives the same bits.
    gather, scatter: (N,) relative order of the tokens and its inverse, or None to leave them as they lie.
    token_order: which of the stage's permutations the tokens are in afterwards, None for the image's own order.
    masks: (2, B, 1, 1) factors of both branches per sample (stochastic depth).
    hidden: what windows add to the scores of keys (`layers.Attention.mix`).
    sight: what the tokens see, with the keys and values of the block where there is a memory.
    autocast: the mode of the pass that built the chain; a re-run in the backward pass enters it again. The weight
        cache is off: with it, gradients of many uses of a weight are summed in bf16 (20 % error at 1000 uses against
        0.5 %).
    is_detached: the gradient goes back through its skip alone (`run_detached`).
    injected: the state is (B, 2N, D), the stream before the stage's input, which the block adds (`conditioning`).
    """

    block: Block
    projection: NonLinearProjection | None
    slot: ApplicationSpec
    gather: Tensor | None
    scatter: Tensor | None
    token_order: int | None
    masks: Tensor | None
    autocast: Callable[[], contextlib.AbstractContextManager[object]]
    injected: bool
    is_detached: bool
    dropout: Dropout | None
    hidden: Tensor | None = None
    sight: Sight | None = None

    is_boxed = True
    """A call may also be given its input alone in a list, which it empties: it is free once it was reordered."""

    def __call__(self, x_BND: Tensor | list[Tensor]) -> Tensor:
        if isinstance(x_BND, list):
            x_BND = x_BND.pop()
        with self.autocast():
            x_BND, *carried = self.block_inputs(x_BND)
            x_BND = self._transform(x_BND)
            return torch.cat([x_BND, *carried], dim=1) if carried else x_BND

    def block_inputs(self, x_BND: Tensor) -> list[Tensor]:
        """What the block gets: the stream as it is sliced, and the stage's input where that is carried along."""
        if not self.injected:
            return [self.reordered(x_BND)]
        x_BND, input_BND = map(self.reordered, x_BND.chunk(2, dim=1))
        injection = cast(InputInjection, self.block.conditioning)
        return [injection(x_BND, input_BND, self.slot.loop), input_BND]

    def skipped(self, x_BND: Tensor) -> Tensor:
        """What the skip alone carries through the application, in the order in which it leaves the tokens.

        Its coefficients get no gradient. ValueError where norms follow the residuals.
        """
        if self.block.norms_after:
            raise ValueError("a block with norms after its residuals has no skip")
        residuals = [*self.block.residuals]
        if self.projection is not None:
            residuals.append(self.projection.residual)
        parts = [self.reordered(part) for part in (x_BND.chunk(2, dim=1) if self.injected else (x_BND,))]
        for residual in residuals:
            if residual.alpha is not None:
                parts[0] = parts[0] * residual.alpha.detach()
        return torch.cat(parts, dim=1) if self.injected else parts[0]

    def reordered(self, x_BND: Tensor) -> Tensor:
        """The tokens in the order in which the application slices and leaves them."""
        if self.gather is None or self.scatter is None:
            return x_BND
        return reorder_tokens(x_BND, self.gather, self.scatter)

    def _transform(self, x_BND: Tensor) -> Tensor:
        draw = None if self.dropout is None else self.dropout.masks(x_BND)
        slot = self.slot
        x_BND = self.block(x_BND, slot.loop, slot.groups, self.masks, draw, slot.place, self.hidden, self.sight)
        x_BND = x_BND if self.projection is None else self.projection(x_BND, draw, slot.place)
        return self.block.finished(x_BND)

    def parameters(self) -> tuple[Tensor, ...]:
        """Every parameter that a call reads, and its context."""
        parts: list[nn.Module] = [self.block] if self.projection is None else [self.block, self.projection]
        return *(parameter for part in parts for parameter in part.parameters()), *self.context

    @property
    def context(self) -> tuple[Tensor, ...]:
        """What a call reads beside its input and is no parameter: it has a history, and gets a gradient."""
        return () if self.sight is None else self.sight.memory

    def with_context(self, context: tuple[Tensor, ...]) -> "Application":
        """The same application with other tensors for its context."""
        assert self.sight is not None
        return replace(self, sight=self.sight._replace(memory=context))


Chain = Callable[[Sequence["Application"], Tensor], Tensor]
"""A way to run the applications of a stage: their common input to their last output, both (B, N, D)."""


@contextlib.contextmanager
def chains_run_by(stages: Iterable[nn.Module], way: Callable[[int], Chain]) -> Iterator[None]:
    """Inside the `with`, stage number i runs its chain by `way(i)`; behind it, as before."""
    ours = [cast(Stage, stage) for stage in stages]
    before = [stage.run_chain for stage in ours]
    try:
        for index, stage in enumerate(ours):
            stage.run_chain = way(index)
        yield
    finally:
        for stage, chain in zip(ours, before, strict=True):
            stage.run_chain = chain


def context_of(applications: Iterable[Application]) -> tuple[Tensor, ...]:
    """The context of all applications, each tensor once."""
    return tuple(dict.fromkeys(tensor for application in applications for tensor in application.context))


def chain_of(function: Callable[..., Tensor], *given: object) -> Chain:
    """The way of an autograd function that takes what is given, the applications, their input and their context."""
    return lambda applications, x_BND: function(*given, applications, x_BND, *context_of(applications))


def run_in_turn(applications: Sequence[Application], x_BND: Tensor) -> Tensor:
    """The plain way to run a chain: one application after another."""
    for application in applications:
        x_BND = application(x_BND)
    return x_BND


class Stage(nn.Module):
    """Blocks and projections of one resolution level. `run_chain` and `permutations` may be replaced from outside."""

    def __init__(self, config: StackConfig, index: int, blocks: Iterable[nn.Module] | None = None) -> None:
        """blocks: others than ours that take the place of a `Block` each, such as `timm_stack.ForeignBlock`."""
        super().__init__()
        stage = config.stages[index]
        self.config = config
        self.index = index
        self.slots = application_slots(config, index)
        self.dropout = config.dropout
        self.injected = stage.conditioning in ("input_add", "input_gated", "input_tied")
        self.drop_path_rates = [drop_path_rates(config)[index][slot.block] for slot in self.slots]
        sizes = stored_sizes(config, index)
        kind = {"is_causal": config.is_causal, "has_memory": config.has_memory(index)}
        self.blocks = nn.ModuleList(blocks or (Block(stage, sizes, **kind) for _ in range(stage.num_blocks)))
        # Keys and values of the memory, once for all loops of a block.
        num_readers = stage.num_blocks if config.has_memory(index) else 0
        self.memory = nn.ModuleList(nn.Linear(sizes.width, 2 * sizes.width) for _ in range(num_readers))
        self.projections = nn.ModuleList(NonLinearProjection(stage, sizes) for _ in range(num_projections(stage)))
        self.windows = None
        if stage.slices == "windows":
            assert isinstance(config, SReTConfig), "only tokens on a grid have windows"
            self.windows = WindowOrder(config.grids[index], stage.window)
        self.permutations: Callable[..., Tensor] = self.windows or PermutationSource(config, index)
        self.run_chain: Chain = run_in_turn
        self.chain_number = 0
        """Which chain of a pass `run_chain` is called for: there are several where scores are taken on the way."""

    def forward(
        self, x_BND: Tensor, noise: Noise | None = None, plan: DepthPlan | None = None, sight: Sight | None = None
    ) -> Tensor:
        """The stream after all applications, tokens in their first order. It stays fp32 under autocast."""
        *_, x_BND = self.outputs(x_BND, noise, plan, sight=sight)
        return x_BND

    def outputs(
        self,
        x_BND: Tensor,
        noise: Noise | None = None,
        plan: DepthPlan | None = None,
        counts: Sequence[int] = (),
        sight: Sight | None = None,
    ) -> Iterator[Tensor]:
        """The stream after each of these numbers of loops of the last block, and at last after all applications."""
        slots = self.slots if plan is None else planned_slots(self.config, plan, self.index)
        if self.windows is not None:
            x_BND = self.windows.padded(x_BND)
        order = TokenOrder(self._draw_permutations(slots, x_BND, noise))
        applications = self.chain(slots, x_BND, order, noise, plan)
        if sight is not None:
            sights = self._sights(sight)
            applications = [replace(one, sight=sights[one.slot.block]) for one in applications]
        state = torch.cat([x_BND, x_BND], dim=1) if self.injected else x_BND
        done, self.chain_number = 0, 0
        for end in [*(cut_after(slots, count) for count in counts), len(slots)]:
            for is_detached, part in itertools.groupby(applications[done:end], lambda one: one.is_detached):
                state = (run_detached if is_detached else self.run_chain)(list(part), state)
                self.chain_number += not is_detached
            done = end
            out_BND = state.chunk(2, dim=1)[0] if self.injected else state
            back = order.way(applications[end - 1].token_order, None)
            out_BND = out_BND if back is None else reorder_tokens(out_BND, *back)
            yield out_BND if self.windows is None else self.windows.cropped(out_BND)

    def chain(
        self,
        slots: Sequence[ApplicationSpec],
        x_BND: Tensor,
        order: TokenOrder,
        noise: Noise | None,
        plan: DepthPlan | None = None,
    ) -> list[Application]:
        """The applications of one forward pass of this batch; moves `order` along to the order they end in."""
        masks = self._draw_masks(x_BND, noise, plan)
        num_detached = 0 if plan is None else plan.stages[self.index].num_detached
        autocast = uncached_autocast(x_BND.device.type)
        applications, num_permuted = [], 0
        hidden = None if self.windows is None else self.windows.hidden(x_BND)
        for index, slot in enumerate(slots):
            move = None
            if slot.permuted:
                move, num_permuted = order.move_to(num_permuted % order.count), num_permuted + 1
            elif slot.groups > 1 or self.config.is_causal:
                move = order.move_to(None)
            gather, scatter = move or (None, None)
            applications.append(
                Application(
                    block=cast(Block, self.blocks[slot.block]),
                    projection=None
                    if slot.projection is None
                    else cast(NonLinearProjection, self.projections[slot.projection]),
                    slot=slot,
                    gather=gather,
                    scatter=scatter,
                    token_order=order.current,
                    masks=None if masks is None else masks[index],
                    autocast=autocast,
                    injected=self.injected,
                    is_detached=slot.position < num_detached,
                    dropout=Dropout(self.dropout, (noise.sample_seed, self.index, index))
                    if self.training and noise is not None and self.dropout
                    else None,
                    hidden=None if hidden is None or order.current is None else hidden[order.current],
                )
            )
        return applications

    def _sights(self, sight: Sight) -> list[Sight]:
        """That of each block, with the keys and values that it has of the memory."""
        memory = self.keys_and_values(*sight.memory) if len(sight.memory) == 1 else sight.memory
        return [sight._replace(memory=memory[2 * block : 2 * block + 2]) for block in range(len(self.blocks))]

    def keys_and_values(self, memory_BSD: Tensor) -> tuple[Tensor, ...]:
        """(B, H, S, K) keys and values of a memory for each block in turn: what a `Sight` may hold in its place."""
        heads = self.config.stages[self.index].num_heads
        with uncached_autocast(memory_BSD.device.type)():
            made = [rearrange(one(memory_BSD), "b s (two h k) -> two b h s k", two=2, h=heads) for one in self.memory]
        return tuple(part for both in made for part in both.unbind(0))

    def _draw_permutations(self, slots: Sequence[ApplicationSpec], x_BND: Tensor, noise: Noise | None) -> Tensor | None:
        groups, num_tokens = [slot.groups for slot in slots if slot.permuted], x_BND.shape[1]
        if not groups:
            return None
        if self.config.permutation == "strided" and self.windows is None:
            orders = torch.stack([strided_order(num_tokens, number) for number in groups])
            return uploaded(orders, x_BND.device)
        orders = self.permutations(noise, len(groups), num_tokens, x_BND.device)
        if self.config.is_causal:
            orders = torch.stack([ascending_slices(*pair) for pair in zip(orders, groups, strict=True)])
        return orders

    def _draw_masks(self, x_BND: Tensor, noise: Noise | None, plan: DepthPlan | None) -> Tensor | None:
        rates = self.drop_path_rates if plan is None else planned_rates(self.config, plan, self.index)
        if not self.training or noise is None or not any(rates):
            return None
        return drop_path_masks(uploaded(torch.tensor(rates), x_BND.device), x_BND.shape[0], noise, self.index)


def cut_after(slots: Sequence[ApplicationSpec], num_loops: int) -> int:
    """How many applications have run when the last block has done `num_loops` of its loops."""
    last_block = max(slot.block for slot in slots)
    return 1 + next(i for i, slot in enumerate(slots) if (slot.block, slot.position) == (last_block, num_loops - 1))


def run_detached(applications: Sequence[Application], x_BND: Tensor) -> Tensor:
    """The stream after the applications; the gradient goes back through their skips alone: x + stop_gradient(f(x)).

    Nothing is kept for the backward pass, and parameters get no gradient.
    """
    with torch.no_grad():
        y_BND = run_in_turn(applications, x_BND)
    if not torch.is_grad_enabled():
        return y_BND
    if applications[0].block.outer_norm is not None:
        return _start_of_its_own(applications, x_BND, y_BND)
    for application in applications:
        x_BND = application.skipped(x_BND)
    return with_value(x_BND, y_BND)


def _start_of_its_own(applications: Sequence[Application], x_BND: Tensor, y_BND: Tensor) -> Tensor:
    """The value of y without a way back: a norm of the stream leaves no skip. The stage's input keeps its gradient."""
    if not applications[0].injected:
        return y_BND
    moves = [one.gather for one in applications if one.gather is not None]
    input_BND = x_BND.chunk(2, dim=1)[1]
    if moves:
        # All moves in one.
        gather_N = as_index(moves[0])
        for move in moves[1:]:
            gather_N = gather_N.index_select(0, as_index(move))
        input_BND = reorder_tokens(input_BND, gather_N, gather_N.argsort())
    return torch.cat([y_BND.chunk(2, dim=1)[0], input_BND], dim=1)


def with_value(x: Tensor, value: Tensor) -> Tensor:
    """Another tensor's value, with the gradient of x."""
    return _WithValue.apply(x, value)  # type: ignore[no-untyped-call]


class _WithValue(torch.autograd.Function):
    """Another tensor's value, with the gradient of this one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def uncached_autocast(device_type: str) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """A factory of contexts like the autocast that is active now, with the weight cache off."""
    if not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, cache_enabled=False)
