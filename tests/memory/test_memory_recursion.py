"""Anyone's blocks, applied many times: equal to a plain loop, to the bit, whatever is recomputed."""

import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import sret_scale
from sret_scale.memory.planning.instrument import measure_peak
from sret_scale.memory.recursion import Recursion
from sret_scale.model.config import LoopOrder
from tests.reference.plain_recursion import plain_recursion

WIDTH = 8
SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "none"},
    {"schedule": "per_application"},
    {"schedule": "binomial"},
    {"schedule": "planned", "budget_bytes": 40_000},
]


class RotaryBlock(nn.Module):
    """Attention and feed-forward as in decoders: tables, a mask and a context come as keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.query, self.key = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, *, tables: tuple[Tensor, Tensor], mask: Tensor, context: Tensor) -> Tensor:
        cosine, sine = tables
        query = self.query(self.norm(x))
        query = query * cosine + query.roll(1, -1) * sine
        scores = (query @ self.key(context).mT).masked_fill(mask, -torch.inf)
        x = x + scores.softmax(-1) @ context
        return x + self.mlp(x)


def arguments(context: Tensor) -> dict[str, Any]:
    angle = torch.arange(6.0)[:, None] * torch.ones(WIDTH)
    return {"tables": (angle.cos(), angle.sin()), "mask": torch.ones(6, 6).triu(1).bool(), "context": context}


def example(**options: Any) -> tuple[Recursion, Tensor, Tensor]:
    torch.manual_seed(0)
    recursion = Recursion([RotaryBlock(), RotaryBlock()], 5, **options)
    return recursion, torch.randn(3, 6, WIDTH, requires_grad=True), torch.randn(3, 6, WIDTH, requires_grad=True)


@pytest.mark.parametrize("memory", SCHEDULES, ids=lambda memory: memory["schedule"])
def test_what_comes_from_the_same_weights_is_propagated_once(memory: dict[str, Any]) -> None:
    """A context, and an input that is injected, whose history leads to the weights that the chain uses."""
    budget = 2 * memory.get("budget_bytes", 0) or None
    recursion, *inputs = example(memory=sret_scale.MemoryConfig(**{**memory, "budget_bytes": budget}), injection="add")
    # In float64: gradients of ten applications of such blocks are large, and their last bits are the processor's.
    recursion = recursion.double()
    x, context = (part.detach().double().requires_grad_() for part in inputs)
    grads = []
    for run in (recursion, lambda x, **kwargs: plain_recursion(recursion, x, (), 5, 5, kwargs)[-1]):
        kwargs = arguments(recursion.blocks[0].query(context))
        kwargs["tables"] = tuple(table.double() for table in kwargs["tables"])
        y = run(run(x, **kwargs), **kwargs)
        grads.append(torch.autograd.grad(y.square().sum(), [*recursion.parameters(), x, context]))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", get_args(LoopOrder))
@pytest.mark.parametrize("memory", SCHEDULES, ids=lambda memory: memory["schedule"])
def test_outputs_and_gradients_are_those_of_a_plain_loop(memory: dict[str, Any], order: Any) -> None:
    options: dict[str, Any] = {"order": order, "injection": "add", "step_size": 0.2, "norm": nn.LayerNorm(WIDTH)}
    recursion, x, context = example(memory=sret_scale.MemoryConfig(**memory), **options)
    inputs, last = [*recursion.parameters(), x, context], 5 if order == "block" else 3
    ours = recursion.outputs(x, (3, 4), backprop_loops=last, **arguments(context))
    theirs = plain_recursion(recursion, x, (3, 4), 5, last, arguments(context))
    assert len(ours) == 3 and all(map(torch.equal, ours, theirs))
    for left, right in zip(
        torch.autograd.grad([one.square().mean() for one in ours], inputs),
        torch.autograd.grad([one.square().mean() for one in theirs], inputs),
        strict=True,
    ):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("memory", SCHEDULES[1:], ids=lambda memory: memory["schedule"])
def test_no_schedule_changes_a_bit(memory: dict[str, Any]) -> None:
    found = []
    for config in (SCHEDULES[0], memory):
        recursion, x, context = example(memory=sret_scale.MemoryConfig(**config), injection="add")
        recursion(x, num_loops=20, **arguments(context)).square().mean().backward()
        found.append([x.grad, context.grad, *(one.grad for one in recursion.parameters())])
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True) if left is not None)


def test_a_block_that_is_applied_once_is_itself() -> None:
    block, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()), torch.randn(4, WIDTH)
    assert torch.equal(Recursion([block], 1)(x), block(x))


def test_the_start_has_no_gradient_but_lets_it_past() -> None:
    recursion, x, context = example(order="model")
    block = recursion.blocks[0]
    recursion(x, backprop_loops=1, **arguments(context)).sum().backward()
    with torch.no_grad():
        start = x.detach()
        for _ in range(4):
            start = recursion.blocks[1](block(start, **arguments(context)), **arguments(context))
    own, parameters = start.requires_grad_(), list(recursion.parameters())
    out = recursion.blocks[1](block(own, **arguments(context)), **arguments(context))
    expected = torch.autograd.grad(out.sum(), [own, *parameters], allow_unused=True)
    assert x.grad is not None and torch.equal(x.grad, expected[0])
    for parameter, gradient in zip(parameters, expected[1:], strict=True):
        assert parameter.grad is not None and gradient is not None
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.lengthy
def test_a_budget_is_kept_and_none_would_not_keep_it() -> None:
    taken = {}
    for name, memory in (("none", SCHEDULES[0]), ("planned", SCHEDULES[3])):
        recursion, x, context = example(memory=sret_scale.MemoryConfig(**memory))
        own = arguments(context.detach())

        def step(recursion: Recursion = recursion, x: Tensor = x, own: dict[str, Any] = own) -> None:
            recursion(x, num_loops=100, **own).sum().backward()

        step()
        taken[name] = measure_peak([*recursion.parameters(), x], step)
    assert taken["planned"] <= 1.05 * 40_000 < taken["none"] / 10


def test_arguments_of_another_size_are_planned_for_anew() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, *, context: Tensor) -> Tensor:
            return x + (self.query(x) @ context.mT).softmax(-1) @ context

    memory = sret_scale.MemoryConfig(schedule="planned", budget_bytes=60_000)
    recursion, x = Recursion(Attends(), 8, memory=memory), torch.randn(1, 6, WIDTH)
    recursion(x, context=torch.randn(1, 8, WIDTH)).sum().backward()
    with pytest.raises(ValueError, match=r"no schedule of this chain of 8 applications fits into 58\.59 KiB"):
        recursion(x, context=torch.randn(1, 2000, WIDTH))


def test_health_tells_a_recursion_that_settles() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WIDTH)
    linear.weight.data.mul_(0.5)
    seen = Recursion(linear, 30).health(torch.randn(4, WIDTH))
    assert [(one.block, one.loop) for one in seen] == [(0, loop) for loop in range(30)]
    assert seen[0].relative_change > 0.1 and seen[-1].relative_change < 1e-4


def test_description_counts_weights_once_and_work_each_time() -> None:
    recursion = Recursion(nn.Linear(WIDTH, WIDTH, bias=False), 10)
    found = recursion.describe(torch.randn(4, WIDTH))
    assert (found["applications"], found["parameters"], found["macs"]) == (10, 64, 10 * 4 * 64)
    assert found["boundary_bytes"] == 10 * 4 * WIDTH * 4


@pytest.mark.lengthy
@pytest.mark.parametrize("step_size, is_flat", [(None, True), (1.0, False)])
def test_step_size_of_one_over_depth_keeps_an_update_alike(step_size: float | None, is_flat: bool) -> None:
    """A coordinate check: how far one Adam step moves the output, over the number of applications."""
    moves = []
    for loops in (20, 108, 300):
        torch.manual_seed(0)
        block = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

        class Residual(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor) -> Tensor:
                return x + self.inner(x)

        recursion = Recursion(Residual(block), loops, step_size=step_size or 1 / loops)
        optimizer, x = torch.optim.Adam(recursion.parameters(), lr=1e-3), torch.randn(64, WIDTH)
        before = recursion(x)
        before.square().mean().backward()
        optimizer.step()
        moves.append((recursion(x) - before).detach().square().mean().sqrt().item())
    assert (max(moves) < 2 * min(moves)) == is_flat


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Recursion([], 3), "blocks: a recursion needs at least one module"),
        (lambda: Recursion([nn.Identity()] * 2, 3), "the same module stands there twice"),
        (lambda: Recursion(nn.Identity(), 0), "num_loops: expected at least 1, got 0"),
        (lambda: Recursion(nn.Identity(), 2.5), "num_loops: expected a whole number, got 2.5"),  # type: ignore[arg-type]
        (lambda: Recursion(nn.Identity(), 2, step_size=float("nan")), "step_size: expected a finite number, got nan"),
        (lambda: Recursion(nn.Identity(), 3, order="stage"), "order: expected one of block, .* got 'stage'"),  # type: ignore[arg-type]
        (lambda: Recursion(nn.Linear(8, 4), 3)(torch.ones(2, 8)), r"blocks.0 \(Linear\) made \(2, 4\) of \(2, 8\)"),
        (lambda: Recursion(nn.LSTM(8, 8), 3)(torch.ones(2, 8)), r"blocks.0 \(LSTM\) made tuple of \(2, 8\)"),
        (
            lambda: Recursion(nn.Linear(8, 8), 3).outputs(torch.ones(2, 8), [3]),
            r"counts: .* from 1 to 2, .* got \[3\]",
        ),
        (
            lambda: Recursion(nn.Linear(8, 8), 9).outputs(torch.ones(2, 8), [5], backprop_loops=3),
            r"from 7 to 8, which have a gradient, got \[5\]",
        ),
    ],
)
def test_what_cannot_be_is_said(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_start_that_would_leave_blocks_untrained_is_refused() -> None:
    recursion, x, context = example(norm=nn.LayerNorm(WIDTH))
    with pytest.raises(
        ValueError, match=r"backprop_loops: with order 'block' .* would get no gradient; use order='model'"
    ):
        recursion(x, backprop_loops=2, **arguments(context))


@pytest.mark.parametrize("memory", SCHEDULES[1:], ids=lambda memory: memory["schedule"])
def test_dropout_runs_again_as_it_ran(memory: dict[str, Any]) -> None:
    """Each application draws for itself, and what stands outside gets the numbers that it would get anyway."""
    torch.manual_seed(0)
    block, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)), torch.randn(3, WIDTH)
    found = []
    for config in (SCHEDULES[0], memory):
        torch.manual_seed(1)
        recursion = Recursion(block, 12, step_size=0.5, memory=sret_scale.MemoryConfig(**config))
        first, second = recursion(x), recursion(x)
        assert not torch.equal(first, second)
        found.append([second, *torch.autograd.grad(second.sum(), list(block.parameters())), torch.rand(1)])
    assert all(map(torch.equal, *found))
    assert torch.equal(recursion.eval()(x), Recursion(block[0], 12, step_size=0.5)(x))


def test_draws_that_nobody_announces_are_refused() -> None:
    class Hidden(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x))

    recursion = Recursion(Hidden(8, 8), 4, memory=sret_scale.MemoryConfig(schedule="per_application"))
    with pytest.raises(ValueError, match="gives other values each time it runs"):
        recursion(torch.randn(2, WIDTH)).sum().backward()


def test_projections_are_not_shared() -> None:
    torch.manual_seed(0)
    blocks, projections = [nn.Linear(WIDTH, WIDTH) for _ in range(2)], [nn.Linear(WIDTH, WIDTH) for _ in range(6)]
    recursion, x = Recursion(blocks, 3, order="model", projections=projections), torch.randn(4, WIDTH)
    expected = x
    for index in range(6):
        expected = projections[index](blocks[index % 2](expected))
    assert torch.equal(recursion(x), expected)
    with pytest.raises(ValueError, match="there are projections for 6 applications, got 8 to run"):
        recursion(x, num_loops=4)
    with pytest.raises(ValueError, match="projections: expected one for each of 4 applications, got 6"):
        Recursion(blocks, 2, projections=projections)


@pytest.mark.multi_process
def test_only_torch_is_needed_and_its_import_is_what_takes_time() -> None:
    """Two seconds are the limit, of which torch takes one and a half: a third of its processor time is left."""
    code = (
        "import sys, time, torch; ours = time.process_time(); import sret_scale; sret_scale.Recursion; "
        "print([n for n in ('deepspeed', 'timm') if n in sys.modules], ours, time.process_time() - ours)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names, of_torch, ours = said.rsplit(maxsplit=2)
    assert names == "[]" and float(ours) < float(of_torch) / 3
