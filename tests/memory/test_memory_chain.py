"""Plans of unequal chains: the dynamic program finds what brute force finds, and keeps the budget when it runs."""

from functools import cache, partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sret_scale.memory import plan_chain, run_chain
from sret_scale.memory.planning.costs import ApplicationCost
from sret_scale.memory.planning.instrument import measure_peak
from sret_scale.memory.planning.ledger import account
from sret_scale.memory.planning.predict import predict_chain
from sret_scale.memory.planning.unequal_chains import measure_chain, schedule_within
from sret_scale.memory.schedule import Schedule, grow


@st.composite
def chains(draw: st.DrawFn) -> list[ApplicationCost]:
    """Up to six applications with costs of their own; sizes are small, so that no budget is rounded."""
    boundaries = draw(st.lists(st.integers(1, 5), min_size=2, max_size=7))
    costs = []
    for input_bytes, output_bytes in pairwise(boundaries):
        forward, tape = output_bytes + draw(st.integers(0, 3)), draw(st.integers(0, 20))
        taped = tape + output_bytes + draw(st.integers(0, 2))
        backward = tape + input_bytes + output_bytes + draw(st.integers(0, 4))
        costs.append(
            ApplicationCost(
                boundary_bytes=input_bytes,
                output_bytes=output_bytes,
                forward_bytes=forward,
                taped_bytes=taped,
                tape_bytes=tape,
                backward_bytes=backward,
            )
        )
    return costs


def peak(schedule: Schedule, costs: list[ApplicationCost]) -> int:
    chain = predict_chain(schedule, costs)
    return max(chain.forward_peak, chain.backward_peak)


def middle_of(tree: dict[tuple[int, int, int], int | None], lo: int, hi: int, _room: int) -> int | None:
    return tree[lo, hi, 0]


def all_schedules(length: int) -> list[Schedule]:
    """Every way to split a chain, the last leaf kept taped."""

    @cache
    def trees(lo: int, hi: int) -> tuple[dict[tuple[int, int, int], int | None], ...]:
        found: list[dict[tuple[int, int, int], int | None]] = [{(lo, hi, 0): None}]
        for middle in range(lo + 1, hi):
            for right in trees(middle, hi):
                found += [{**left, **right, (lo, hi, 0): middle} for left in trees(lo, middle)]
        return tuple(found)

    return [
        grow(
            "tree",
            length,
            partial(middle_of, tree),
            room=0,
            sizes=[0] * length,
            is_last_taped=True,
        )
        for tree in trees(0, length)
    ]


@settings(max_examples=40, deadline=None)
@given(chains(), st.data())
def test_the_program_is_optimal_among_all_schedules(costs: list[ApplicationCost], data: st.DataObject) -> None:
    times = [float(data.draw(st.integers(1, 5))) for _ in costs]
    options = []
    for schedule in all_schedules(len(costs)):
        extra = sum(runs * time for runs, time in zip(account(schedule).untaped, times, strict=True))
        options.append((peak(schedule, costs), extra))
    lowest = min(bytes_ for bytes_, _ in options)
    budget = data.draw(st.integers(lowest, max(bytes_ for bytes_, _ in options)))
    schedule = schedule_within(costs, times, budget)
    extra = sum(runs * time for runs, time in zip(account(schedule).untaped, times, strict=True))
    assert peak(schedule, costs) <= budget
    assert extra == min(other for bytes_, other in options if bytes_ <= budget)
    with pytest.raises(ValueError, match="no schedule of this chain"):
        schedule_within(costs, times, lowest - 1)


def unequal_chain(length: int) -> list[nn.Module]:
    """Wide and narrow blocks in turn, one of them used again and again."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(16, 128), nn.GELU(), nn.Linear(128, 16))
    return [wide if index % 3 else nn.Sequential(nn.Linear(16, 16), nn.GELU()) for index in range(length)]


@pytest.mark.lengthy
@pytest.mark.parametrize("length", [12, 70])
def test_a_planned_chain_keeps_its_budget_and_its_gradients(length: int) -> None:
    chain, x = unequal_chain(length), torch.randn(64, 16)
    parameters = list({p: None for module in chain for p in module.parameters()})
    costs = measure_chain(chain, x)
    assert all(p.grad is None for p in parameters)

    def gradients(schedule: Schedule | None) -> list[Tensor]:
        y = nn.Sequential(*chain)(x) if schedule is None else run_chain(chain, x, schedule)
        return list(torch.autograd.grad(y.sum(), parameters))

    def step(schedule: Schedule) -> None:
        run_chain(chain, x.clone(), schedule).sum().backward()

    expected = gradients(None)
    most, previous = sum(cost.tape_bytes + cost.boundary_bytes for cost in costs), float("inf")
    for share in (0.3, 0.5, 0.8, 1.1):
        budget = int(share * most)
        schedule = plan_chain(chain, x, budget)
        assert all(torch.equal(a, b) for a, b in zip(gradients(schedule), expected, strict=True))
        used = measure_peak(parameters, partial(step, schedule))
        assert used <= budget + 3 * x.nbytes  # the chain's output, its gradient and the copy of x are the caller's
        assert account(schedule).total_untaped <= previous
        previous = account(schedule).total_untaped
    assert previous == 0
    with pytest.raises(ValueError, match="expected at least about"):
        plan_chain(chain, x, 100)
