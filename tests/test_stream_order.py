"""Order, state and the split over ranks: pure arithmetic, checked against slow twins."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.order import Order, advance, keyed_permutation, keyed_uniforms, rank_positions, steps_per_epoch
from tests.reference import order as reference

FINGERPRINT = "ab" * 32


def _order(num_samples: int, kind: str = "full", seed: int = 0) -> Order:
    return Order(kind=kind, num_samples=num_samples, fingerprint=FINGERPRINT, seed=seed)  # type: ignore[arg-type]


def _all(order: Order, epoch: int) -> list[int]:
    return order.samples(epoch, np.arange(order.epoch_length)).tolist()


@given(num_samples=st.integers(1, 500), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_full_order_is_its_twin_and_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    got = _all(_order(num_samples, seed=seed), epoch)
    assert got == reference.permutation(num_samples, "order", FINGERPRINT, seed, epoch)
    assert sorted(got) == list(range(num_samples))


def test_full_order_is_frozen() -> None:
    """Another version of this code must continue the runs of this one."""
    assert _all(_order(10), 0) == [5, 8, 3, 9, 6, 4, 2, 0, 1, 7]


def test_sequential_order_counts() -> None:
    assert _all(_order(7, "sequential"), 3) == list(range(7))


def test_epochs_seeds_and_fingerprints_have_other_orders() -> None:
    base = _all(_order(100), 0)
    other = Order(kind="full", num_samples=100, fingerprint="cd" * 32, seed=0)
    assert (
        len({tuple(base), tuple(_all(_order(100), 1)), tuple(_all(_order(100, seed=1), 0)), tuple(_all(other, 0))}) == 4
    )


@pytest.mark.parametrize("seed", range(5))
def test_shuffle_is_uncorrelated_with_storage_order_and_other_epochs(seed: int) -> None:
    """Also class-sorted input is mixed: the deviation of a rank correlation of n pairs is 1 / sqrt(n) = 0.0071."""
    order = _order(20_000, seed=seed)
    first, second = np.array(_all(order, 0)), np.array(_all(order, 1))
    assert abs(np.corrcoef(np.arange(20_000), first)[0, 1]) < 5 * 0.0071
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 * 0.0071
    labels = first // 2_000
    shares = np.stack([np.bincount(part, minlength=10) for part in labels.reshape(20, 1000)]) / 1000
    assert shares.max() < 0.1 + 6 * 0.0095 and shares.min() > 0.1 - 6 * 0.0095


topologies = st.tuples(st.integers(1, 64), st.integers(1, 4), st.integers(1, 3))


@given(
    topology=topologies,
    num_samples=st.integers(1, 3000),
    last=st.sampled_from(["drop", "pad"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_ranks_read_the_twin_s_batches(topology: tuple[int, int, int], num_samples: int, last: str, seed: int) -> None:
    world_size, micro_batch_size, grad_accum_steps = topology
    global_batch_size = world_size * micro_batch_size * grad_accum_steps
    if global_batch_size > num_samples:
        num_samples += global_batch_size
    order = _order(num_samples, seed=seed)
    batches = reference.epoch_batches(_all(order, 0), global_batch_size, last)
    assert len(batches) == steps_per_epoch(num_samples, global_batch_size, last)  # type: ignore[arg-type]
    for rank in {0, world_size // 2, world_size - 1}:
        for step, batch in enumerate(batches):
            positions = rank_positions(
                step * global_batch_size,
                rank=rank,
                world_size=world_size,
                micro_batch_size=micro_batch_size,
                grad_accum_steps=grad_accum_steps,
            )
            assert order.samples(0, positions).tolist() == reference.rank_part(
                batch, rank, world_size, grad_accum_steps
            )
    seen = [sample for batch in batches for sample in batch]
    surplus = len(batches) * global_batch_size - num_samples
    assert len(set(seen)) == min(num_samples, len(seen)) and surplus < global_batch_size


@given(
    num_samples=st.integers(200, 1000),
    global_batch_size=st.integers(1, 200),
    last=st.sampled_from(["drop", "pad"]),
    stop=st.integers(1, 30),
)
@settings(max_examples=50, deadline=None)
def test_a_resumed_walk_is_the_rest_of_the_walk(num_samples: int, global_batch_size: int, last: str, stop: int) -> None:
    def walk(epoch: int, position: int, num_steps: int) -> list[tuple[int, int]]:
        starts = []
        for _ in range(num_steps):
            epoch, position = advance(
                epoch,
                position,
                epoch_length=num_samples,
                global_batch_size=global_batch_size,
                last=last,  # type: ignore[arg-type]
            )
            starts.append((epoch, position))
            position += global_batch_size
        return starts

    whole = walk(0, 0, 40)
    epoch, position = whole[stop - 1]
    assert walk(epoch, position + global_batch_size, 40 - stop) == whole[stop:]
    steps = steps_per_epoch(num_samples, global_batch_size, last)  # type: ignore[arg-type]
    assert whole == [(step // steps, step % steps * global_batch_size) for step in range(40)]


def test_any_position_of_an_imagenet_epoch_is_restored_in_a_second() -> None:
    start = time.perf_counter()
    _order(1_281_167).samples(299, np.arange(1_281_000, 1_281_100))
    assert time.perf_counter() - start < 1.0


def test_uniforms_are_uniform_and_keyed() -> None:
    values = keyed_uniforms(100_000, "test", 1)
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 5 * (1 / 12 / 100_000) ** 0.5
    assert not np.array_equal(values, keyed_uniforms(100_000, "test", 2))
    assert keyed_permutation(1, "x").tolist() == [0]
