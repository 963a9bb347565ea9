"""Order, state and the split over ranks: pure arithmetic, checked against slow twins."""

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.keyed_random import keyed_permutation, keyed_uniforms
from data_pipelines.stream.order import Order, advance, rank_positions, steps_per_epoch
from tests.reference import order as reference

FINGERPRINT = "ab" * 32


def _order(num_samples: int, **changes: Any) -> Order:
    fields: dict[str, Any] = {"kind": "full", "fingerprint": FINGERPRINT, "seed": 0, "global_batch_size": 8}
    return Order(**{**fields, "shard_sizes": [num_samples], **changes})


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
    assert _all(_order(7, kind="sequential"), 3) == list(range(7))


def test_epochs_seeds_and_fingerprints_have_other_orders() -> None:
    base = _all(_order(100), 0)
    other = _order(100, fingerprint="cd" * 32)
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


@given(data=st.data(), kind=st.sampled_from(["full", "block", "sequential"]), last=st.sampled_from(["drop", "pad"]))
@settings(max_examples=50, deadline=None)
def test_a_run_resumed_on_another_world_goes_on_as_the_twin(data: st.DataObject, kind: str, last: str) -> None:
    """Worlds of 1 to 64 ranks before and after, any accumulation, counts that nothing divides, over several epochs."""
    before = data.draw(st.integers(1, 64), "world before")
    global_batch_size = before * data.draw(st.integers(1, 6), "samples of a rank")
    divisors = [size for size in range(1, 65) if global_batch_size % size == 0]
    after = data.draw(st.sampled_from(divisors), "world after")
    num_samples = global_batch_size + data.draw(st.integers(0, 700), "surplus")
    sizes = [num_samples // 3, num_samples - num_samples // 3]
    order = _order(num_samples, kind=kind, seed=9, shard_sizes=sizes, global_batch_size=global_batch_size)
    twins = {
        "full": lambda epoch: reference.permutation(num_samples, "order", FINGERPRINT, 9, epoch),
        "block": lambda epoch: reference.block_order(sizes, global_batch_size, 8192, (FINGERPRINT, 9, epoch)),
        "sequential": lambda epoch: list(range(num_samples)),
    }
    first = data.draw(st.integers(0, 1000), "first epoch")
    epochs = [reference.epoch_batches(twins[kind](epoch), global_batch_size, last) for epoch in (first, first + 1)]
    expected = [batch for batches in epochs for batch in batches]
    stop = data.draw(st.integers(0, len(expected)), "stop")
    got: list[list[int]] = []
    state = (first, 0)
    for world_size, num_steps in ((before, stop), (after, len(expected) - stop)):
        batches, state = _walk(order, state, num_steps, world_size, last)
        got += batches
    assert got == expected


def _walk(
    order: Order, state: tuple[int, int], num_steps: int, world_size: int, last: Any
) -> tuple[list[list[int]], tuple[int, int]]:
    """The global batches of the next steps, the parts of all ranks joined, and the state after them."""
    size, (epoch, position), batches = order.global_batch_size, state, []
    per_rank = size // world_size
    accum = 2 if per_rank % 2 == 0 else 1
    for _ in range(num_steps):
        epoch, position = advance(epoch, position, epoch_length=order.epoch_length, global_batch_size=size, last=last)
        ranks = [
            rank_positions(
                position,
                rank=rank,
                world_size=world_size,
                micro_batch_size=per_rank // accum,
                grad_accum_steps=accum,
            )
            for rank in range(world_size)
        ]
        assert {part.shape for part in ranks} == {(accum, per_rank // accum)}
        batches.append(order.samples(epoch, np.concatenate([part.ravel() for part in ranks])).tolist())
        position += size
    return batches, (epoch, position)


@pytest.mark.parametrize("kind", ["full", "block", "sequential"])
def test_any_position_of_an_imagenet_epoch_is_restored_in_a_second(kind: str) -> None:
    order = _order(1_281_167, kind=kind, shard_sizes=[1000] * 1281 + [167], global_batch_size=1024)
    start = time.process_time()
    order.samples(299, np.arange(1_281_000, 1_281_100))
    assert time.process_time() - start < 1.0


def test_uniforms_are_uniform_and_keyed() -> None:
    values = keyed_uniforms(100_000, "test", 1)
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 5 * (1 / 12 / 100_000) ** 0.5
    assert not np.array_equal(values, keyed_uniforms(100_000, "test", 2))
    assert keyed_permutation(1, "x").tolist() == [0]


shard_sizes = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@given(sizes=shard_sizes, global_batch_size=st.integers(1, 96), window=st.integers(1, 100), epoch=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_block_order_is_its_twin_and_a_permutation(
    sizes: list[int], global_batch_size: int, window: int, epoch: int
) -> None:
    order = Order(
        kind="block",
        fingerprint=FINGERPRINT,
        seed=5,
        shard_sizes=sizes,
        global_batch_size=global_batch_size,
        block_window=window,
    )
    got = _all(order, epoch)
    assert got == reference.block_order(sizes, global_batch_size, window, (FINGERPRINT, 5, epoch))
    assert sorted(got) == list(range(sum(sizes)))


@pytest.mark.parametrize("world_size", [1, 4, 16])
def test_block_order_needs_few_shards_at_a_time(world_size: int) -> None:
    """1000 shards of 100 samples, windows of 200: a rank needs about three shards per lane in any ten steps."""
    order = Order(
        kind="block", fingerprint="", seed=0, shard_sizes=[100] * 1000, global_batch_size=256, block_window=200
    )
    lanes_per_rank = 64 // world_size
    for first_step in (0, 100, 300):
        steps = [
            rank_positions(
                step * 256,
                rank=1 % world_size,
                world_size=world_size,
                micro_batch_size=256 // world_size,
                grad_accum_steps=1,
            )
            for step in range(first_step, first_step + 10)
        ]
        shards = np.unique(order.samples(0, np.stack(steps)) // 100)
        assert len(shards) <= 5 * lanes_per_rank


def test_block_order_mixes_class_sorted_shards() -> None:
    """Ten classes of 40 shards each, sorted: every batch holds most classes, and neighbours are uncorrelated."""
    order = Order(kind="block", fingerprint="", seed=0, shard_sizes=[50] * 400, global_batch_size=256, block_window=500)
    got = np.array(_all(order, 0))
    labels = got // 2000
    assert min(len(np.unique(batch)) for batch in labels[: 78 * 256].reshape(78, 256)) >= 9
    assert abs(np.corrcoef(np.arange(20_000), got)[0, 1]) < 5 / 400**0.5


@given(
    num_samples=st.integers(1, 200),
    num_repeats=st.integers(1, 5),
    global_batch_size=st.integers(1, 64),
    kind=st.sampled_from(["full", "block", "sequential"]),
)
@settings(max_examples=50, deadline=None)
def test_every_repeat_comes_once_and_near_the_others(
    num_samples: int, num_repeats: int, global_batch_size: int, kind: str
) -> None:
    order = _order(num_samples, kind=kind, num_repeats=num_repeats, global_batch_size=global_batch_size)
    positions = np.arange(order.epoch_length)
    samples, repeats = order.samples(0, positions), order.repeats(positions)
    pairs = list(zip(samples.tolist(), repeats.tolist(), strict=True))
    assert sorted(pairs) == [(sample, repeat) for sample in range(num_samples) for repeat in range(num_repeats)]
    if global_batch_size % num_repeats == 0:
        for start in range(0, order.epoch_length - global_batch_size + 1, global_batch_size):
            batch = samples[start : start + global_batch_size]
            assert np.unique(batch, return_counts=True)[1].tolist() == [num_repeats] * (
                global_batch_size // num_repeats
            )
