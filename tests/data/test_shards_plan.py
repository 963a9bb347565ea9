"""The plan: every image in exactly one shard, shards of equal size, the same plan for the same arguments."""

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.shards.packed_strings import pack_strings
from data_pipelines.sources.listing import Listing
from data_pipelines.writing.shard_plan import Plan, load_plan, make_plan, save_plan


def listing_of(sizes: list[int]) -> Listing:
    count = len(sizes)
    return Listing(
        class_names=["a", "b"],
        paths=pack_strings(["/source"]),
        path_of=np.zeros(count, np.int32),
        offset=np.arange(count, dtype=np.int64),
        length=np.array(sizes, np.int64),
        label=np.arange(count, dtype=np.int32) % 2,
        keys=pack_strings(f"key{number}" for number in range(count)),
        names=pack_strings(f"name{number} \udcff" for number in range(count)),
    )


SIZES = st.lists(st.integers(0, 300_000), min_size=1, max_size=200)


@settings(max_examples=50, deadline=None)
@given(SIZES, st.none() | st.integers(0, 3), st.integers(1, 50))
def test_every_image_is_in_one_shard_of_at_most_the_count(sizes: list[int], seed: int | None, most: int) -> None:
    plan = make_plan(listing_of(sizes), {}, seed=seed, shard_bytes=1, shard_samples=most)
    counts = np.diff(plan.starts)
    assert plan.starts[0] == 0 and plan.starts[-1] == len(sizes)
    assert counts.min() >= 1 and counts.max() <= most and counts.max() - counts.min() <= 1
    assert plan.num_shards == -(-len(sizes) // most)
    order = plan.listing.offset.tolist()
    assert sorted(order) == list(range(len(sizes))) and (seed is not None or order == sorted(order))
    # Rows stay together.
    assert list(plan.listing.keys) == [f"key{number}" for number in order]
    assert plan.listing.length.tolist() == [sizes[number] for number in order]


@settings(max_examples=50, deadline=None)
@given(SIZES, st.integers(10_000, 2_000_000))
def test_shards_have_about_the_bytes_asked_for(sizes: list[int], shard_bytes: int) -> None:
    plan = make_plan(listing_of(sizes), {}, seed=0, shard_bytes=shard_bytes, shard_samples=None)
    assert plan.starts[0] == 0 and plan.starts[-1] == len(sizes) and np.diff(plan.starts).min() >= 1
    weights = -(-plan.listing.length // 512) * 512 + 5 * 512
    totals = np.add.reduceat(weights, plan.starts[:-1])
    assert totals.max() <= shard_bytes + weights.max()


@settings(max_examples=20, deadline=None)
@given(SIZES)
def test_the_plan_depends_on_seed_and_content_only(sizes: list[int]) -> None:
    def order(listing: Listing, seed: int) -> list[int]:
        plan: Plan = make_plan(listing, {}, seed=seed, shard_bytes=1 << 20, shard_samples=None)
        return plan.listing.offset.tolist()

    assert order(listing_of(sizes), 1) == order(listing_of(sizes), 1)
    if len(sizes) > 20:
        assert order(listing_of(sizes), 1) != order(listing_of(sizes), 2)
        assert order(listing_of(sizes), 1) != order(listing_of([*sizes[:-1], sizes[-1] + 1]), 1)


def test_a_saved_plan_is_the_same_plan(tmp_path: Path) -> None:
    plan = make_plan(listing_of([10, 20, 30]), {"kind": "folder"}, seed=5, shard_bytes=1, shard_samples=2)
    save_plan(plan, tmp_path)
    loaded = load_plan(tmp_path)
    assert loaded.arguments == plan.arguments and loaded.starts.tolist() == plan.starts.tolist()
    assert list(loaded.listing.names) == list(plan.listing.names)
    assert list(loaded.listing.keys) == list(plan.listing.keys)
    assert np.array_equal(loaded.listing.label, plan.listing.label)
