"""The executor: gradients are bit-identical to plain autograd under every schedule, and wrong chains are refused."""

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sret_scale.memory import run_chain
from sret_scale.memory import schedule as schedules
from sret_scale.memory.schedule import Schedule
from tests.reference import checkpoint as twins

WIDTH, LENGTH = 16, 11


class Block(nn.Module):
    """A pre-norm residual block in which one parameter (`gain`) is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.down(nn.functional.gelu(self.up(self.norm(x)) * self.gain))


class Use:
    """One use of a tied block, then an untied projection; random masks are a function of the index."""

    def __init__(self, block: Block, index: int) -> None:
        self.block, self.index = block, index
        self.projection = nn.Linear(WIDTH, WIDTH)

    def parameters(self) -> Iterable[nn.Parameter]:
        return (*self.block.parameters(), *self.projection.parameters())

    def __call__(self, x: Tensor) -> Tensor:
        mask = torch.rand(x.shape[0], 1, 1, generator=torch.Generator().manual_seed(self.index)) < 0.8
        return x + 0.3 * mask * self.projection(self.block(x))


def make_chain(length: int = LENGTH) -> list[Use]:
    torch.manual_seed(0)
    blocks = [Block(), Block()]
    return [Use(blocks[index * 2 // length], index) for index in range(length)]


class _Lambda:
    """A link of a chain made of any function."""

    def __init__(self, function: Callable[[Tensor], Tensor], module: nn.Module) -> None:
        self.function, self.parameters = function, module.parameters

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


def link(function: Callable[[Tensor], Tensor], module: nn.Module | None = None) -> Any:
    """A link that applies `function` and uses the parameters of `module`."""
    return _Lambda(function, module or nn.Identity())


def unique_parameters(chain: list[Use]) -> list[nn.Parameter]:
    return list({p: None for use in chain for p in use.parameters()})


Run = Callable[[list[Use], Tensor], Tensor]


def gradients(chain: list[Use], x: Tensor, run: Run, *, autocast: bool, repeats: int = 2) -> list[Tensor | None]:
    """Output, gradient of x and of each parameter after `repeats` accumulated backward passes."""
    for p in (x, *unique_parameters(chain)):
        p.grad = None
    for _ in range(repeats):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            y = run(chain, x)
            loss = (y.float() * torch.linspace(-1, 1, WIDTH)).square().sum()
        loss.backward()
    return [y.detach(), x.grad, *(p.grad for p in unique_parameters(chain))]


def assert_same(got: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a is None or b is None:
            assert a is b, index
        else:
            assert a.dtype == b.dtype and torch.equal(a, b), index


ALL = [
    schedules.none(LENGTH),
    schedules.per_application(LENGTH),
    schedules.binomial(LENGTH, 3, num_taped=4),
    schedules.binomial(LENGTH, 2, leaf=2),
    schedules.segments(LENGTH, 3),
    schedules.segments(LENGTH, 1),
    schedules.nested(LENGTH, 3),
    schedules.binomial(LENGTH, 1),
    schedules.binomial(LENGTH, 3),
]


@pytest.mark.lengthy
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
def test_gradients_are_those_of_plain_autograd_bit_for_bit(schedule: Schedule, autocast: bool) -> None:
    chain, x = make_chain(), torch.randn(4, 5, WIDTH).requires_grad_()
    expected = gradients(chain, x, twins.run_plain, autocast=autocast)
    assert_same(gradients(chain, x, partial(run_chain, schedule=schedule), autocast=autocast), expected)


@pytest.mark.parametrize(
    "twin",
    [twins.run_per_application, partial(twins.run_segments, length=4), partial(twins.run_nested, length=4)],
    ids=["per_application", "segments", "nested"],
)
def test_the_twin_agrees_where_it_is_exact(twin: Run) -> None:
    chain, x = make_chain(), torch.randn(4, 5, WIDTH).requires_grad_()
    ours = gradients(chain, x, partial(run_chain, schedule=schedules.nested(LENGTH, 3)), autocast=True)
    assert_same(ours, gradients(chain, x, twin, autocast=True))


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
def test_frozen_parameters_and_a_constant_input(schedule: Schedule) -> None:
    chain, x = make_chain(), torch.randn(4, 5, WIDTH)
    chain[0].block.gain.requires_grad_(False)
    chain[2].projection.requires_grad_(False)
    expected = gradients(chain, x, twins.run_plain, autocast=False)
    assert_same(gradients(chain, x, partial(run_chain, schedule=schedule), autocast=False), expected)
    assert x.grad is None and chain[0].block.gain.grad is None


def test_a_frozen_chain_passes_the_gradient_on() -> None:
    chain, x = make_chain(), torch.randn(4, 5, WIDTH).requires_grad_()
    for p in unique_parameters(chain):
        p.requires_grad_(False)
    expected = gradients(chain, x, twins.run_plain, autocast=False)
    assert_same(
        gradients(chain, x, partial(run_chain, schedule=schedules.binomial(LENGTH, 2)), autocast=False), expected
    )


def test_a_whole_constant_chain_has_no_gradient() -> None:
    chain = make_chain()
    for p in unique_parameters(chain):
        p.requires_grad_(False)
    assert not run_chain(chain, torch.randn(4, 5, WIDTH), schedules.binomial(LENGTH, 2)).requires_grad


def test_each_parameter_fires_its_hook_once() -> None:
    chain, x = make_chain(), torch.randn(4, 5, WIDTH)
    fired: list[Tensor] = []
    for p in unique_parameters(chain):
        p.register_post_accumulate_grad_hook(fired.append)
    run_chain(chain, x, schedules.binomial(LENGTH, 3)).sum().backward()
    assert sorted(map(id, fired)) == sorted(map(id, unique_parameters(chain)))


def test_16_bit_parameters_are_summed_in_fp32() -> None:
    """400 uses of a bias: the gradient of each use is about 20, so bf16 sums would stall above 20 * 256."""
    layer = nn.Linear(WIDTH, WIDTH).bfloat16()
    layer.weight.data.zero_()
    chain = [link(lambda x: x + layer(x), layer)] * 400
    run_chain(chain, torch.zeros(20, WIDTH, dtype=torch.bfloat16), schedules.binomial(400, 8)).sum().backward()
    assert layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, torch.full((WIDTH,), 8000.0).bfloat16())


def test_no_gradient_means_a_plain_loop() -> None:
    chain, x = make_chain(), torch.randn(4, 5, WIDTH)
    with torch.no_grad():
        assert torch.equal(run_chain(chain, x, schedules.none(LENGTH)), twins.run_plain(chain, x))


def test_a_module_that_changes_its_input_is_named() -> None:
    chain = [*make_chain(3), link(lambda x: x.mul_(0.5))]
    with pytest.raises(ValueError, match=r"application 3 .* changed its input in place"):
        run_chain(chain, torch.randn(4, 5, WIDTH), schedules.per_application(4))


def test_a_module_that_changes_shape_when_run_again_is_named() -> None:
    runs = iter(range(9))
    chain = [link(lambda x: x + 1), link(lambda x: x if next(runs) == 0 else x[:2]), *make_chain(3)]
    y = run_chain(chain, torch.randn(4, 5, WIDTH), schedules.segments(5, 2))
    with pytest.raises(ValueError, match=r"application 1 .* \(2, 5, 16\) float32 when it was run again"):
        y.sum().backward()


def test_a_module_with_hidden_randomness_is_named_by_the_check() -> None:
    generator = torch.Generator().manual_seed(0)
    chain = [*make_chain(3), link(lambda x: x * torch.rand((), generator=generator)), *make_chain(3)]
    y = run_chain(chain, torch.randn(4, 5, WIDTH), schedules.segments(7, 3), is_checked=True)
    with pytest.raises(ValueError, match=r"application 3 .* digest"):
        y.sum().backward()


def test_dropout_is_named_where_it_runs_again_and_allowed_where_it_does_not() -> None:
    dropout = link(lambda x: nn.functional.dropout(x, 0.5))
    chain, x = [*make_chain(3), dropout, *make_chain(3)], torch.randn(4, 5, WIDTH)
    for schedule in (schedules.segments(7, 3), schedules.per_application(7), schedules.binomial(7, 2)):
        y = run_chain(chain, x, schedule)
        with pytest.raises(ValueError, match=r"application 3 of the chain gives other values .*dropout"):
            y.sum().backward()
    run_chain(chain, x, schedules.none(7)).sum().backward()


def test_another_thread_that_draws_is_no_fault_of_the_chain() -> None:
    # As a thread that augments images may: the generator moves on while an application runs, its values do not change.
    runs = []

    def drawn_beside(x: Tensor) -> Tensor:
        runs.append(torch.rand(3))
        return x + 1

    chain = [*make_chain(3), link(drawn_beside)]
    run_chain(chain, torch.randn(4, 5, WIDTH), schedules.per_application(4)).sum().backward()
    assert len(runs) == 3  # both of the schedule, and the one that compares


def test_the_check_lets_a_sound_chain_pass() -> None:
    chain, x = make_chain(), torch.randn(4, 5, WIDTH).requires_grad_()
    schedule = schedules.binomial(LENGTH, 3)
    expected = gradients(chain, x, twins.run_plain, autocast=True)
    assert_same(gradients(chain, x, partial(run_chain, schedule=schedule, is_checked=True), autocast=True), expected)


def test_a_second_backward_pass_is_refused() -> None:
    y = run_chain(make_chain(), torch.randn(4, 5, WIDTH), schedules.binomial(LENGTH, 3))
    y.sum().backward(retain_graph=True)
    with pytest.raises(ValueError, match="propagated through already"):
        y.sum().backward()


def test_a_schedule_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one for 11 applications, got 10"):
        run_chain(make_chain(), torch.randn(4, 5, WIDTH), schedules.none(10))


@pytest.mark.lengthy
@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
def test_boundaries_in_host_memory_change_nothing(schedule: Schedule) -> None:
    chain, x = make_chain(), torch.randn(4, 5, WIDTH).requires_grad_()
    expected = gradients(chain, x, twins.run_plain, autocast=True)
    run = partial(run_chain, schedule=schedule, is_offloaded=True)
    assert_same(gradients(chain, x, run, autocast=True), expected)


class _Reordering:
    """A link that takes its input in a list and needs it in another order only."""

    is_boxed = True

    def __init__(self) -> None:
        self.was_alive: list[bool] = []

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    def __call__(self, given: list[Tensor]) -> Tensor:
        x = given.pop()
        alive = weakref.ref(x)
        y = x.flip(0)
        del x
        self.was_alive.append(alive() is not None)
        return 2 * y


def test_an_input_that_was_only_reordered_is_free_while_a_link_runs() -> None:
    last = _Reordering()
    chain: list[Any] = [*make_chain(2), last]
    x = torch.randn(4, 5, WIDTH).requires_grad_()
    run_chain(chain, x, schedules.segments(3, 1)).sum().backward()
    assert last.was_alive == [False, False]


def test_the_incoming_gradient_is_free_once_the_last_application_has_read_it() -> None:
    """The gradient of the output is 64 times as large as anything else in the chain."""
    alive: list[bool] = []
    incoming: list[weakref.ref[Tensor]] = []

    class Notes(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            alive.append(incoming[0]() is not None)
            return grad.clone()

    class Gives(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            gradient = torch.ones(2, 64)
            incoming.append(weakref.ref(gradient))
            return gradient

    chain = [link(Notes.apply), link(lambda x: x.repeat(1, 64))]
    x = torch.randn(2, 1).requires_grad_()
    Gives.apply(run_chain(chain, x, schedules.segments(2, 1))).backward()
    assert alive == [False]
    assert x.grad is not None and torch.equal(x.grad, torch.full((2, 1), 64.0))


def unmasked(use: Use, x: Tensor) -> Tensor:
    return x + use.projection(use.block(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_boundaries_in_pinned_memory_come_back_with_their_bits() -> None:
    chain, x = make_chain(), torch.randn(4, 5, WIDTH, device="cuda")
    for use in chain:
        use.block.cuda()
        use.projection.cuda()
    links = [link(partial(unmasked, use), nn.ModuleList([use.block, use.projection])) for use in chain]
    results = []
    for is_offloaded in (False, True):
        for p in unique_parameters(chain):
            p.grad = None
        run_chain(links, x, schedules.binomial(LENGTH, 3), is_offloaded=is_offloaded).sum().backward()
        results.append([p.grad for p in unique_parameters(chain)])
    assert_same(results[1], results[0])


@pytest.mark.parametrize("schedule", [schedules.segments(3, 1), schedules.binomial(3, 1)], ids=lambda s: s.name)
def test_an_input_changed_before_the_backward_pass_is_named(schedule: Schedule) -> None:
    x = torch.randn(4, 5, WIDTH)
    y = run_chain(make_chain(3), x, schedule)
    x.zero_()
    with pytest.raises(ValueError, match="changed in place before its backward pass"):
        y.sum().backward()
