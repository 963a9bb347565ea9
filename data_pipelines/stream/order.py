"""Who reads what, as pure arithmetic: sample = order(fingerprint, seed, epoch, position).

    positions of an epoch      0 1 2 3 4 5 6 7 8 9 ...          the same for every number of ranks
    global batches             [0 1 2 3] [4 5 6 7] ...          each `global_batch_size` positions
    rank r of 2                r0: 0 1   r0: 4 5                the contiguous r-th part of each global batch
    micro batches              contiguous parts of the rank's part
    sample                     permutation(epoch)[position]

Computing the permutation of 1.28 million samples takes 0.3 s on one core; nothing else is needed to start anywhere.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data_pipelines.config import DataConfig, LastBatch, OrderKind
from data_pipelines.keyed_random import keyed_permutation, keyed_uniforms
from data_pipelines.shards.index import ShardSet
from data_pipelines.shards.mixture import MixedShardSet

Indices = NDArray[np.int64]

# Most lanes of a block order: as many ranks (or nodes) can read shards of their own.
MAX_LANES = 64

# Weights of a mixture that are longer than this in the name of an order are named by their hash: a state stays small.
_MAX_WEIGHTS = 24


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of one shard set: `order.samples(epoch, positions)`.

    `full` is one permutation of all samples per epoch, for shards on local or cached storage. `block` shuffles the
    shards, and samples within a window of `block_window`, so that few shards are needed at a time. `sequential` is
    as stored. A mixture (`part_sizes`) takes from each of its sets in proportion to `part_weights` (none: to their
    sizes), and goes through each set round by round, in a new order of this kind every round.
    Each sample comes `num_repeats` times in an epoch, within one global batch (repeated augmentation).
    """

    kind: OrderKind
    fingerprint: str
    seed: int
    shard_sizes: Sequence[int]
    global_batch_size: int
    block_window: int = 8192
    num_repeats: int = 1
    part_sizes: tuple[int, ...] = ()
    part_weights: tuple[float, ...] = ()
    _cache: dict[int, Indices] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, shards: ShardSet, config: DataConfig, *, seed: int, global_batch_size: int) -> "Order":
        """The training order of `shards`."""
        part_sizes = shards.part_sizes if isinstance(shards, MixedShardSet) else ()
        return cls(
            kind=config.order,
            fingerprint=shards.fingerprint,
            seed=seed,
            shard_sizes=np.bincount(shards.shard_of, minlength=shards.num_shards).tolist(),
            global_batch_size=global_batch_size,
            block_window=config.block_window,
            num_repeats=config.num_repeats,
            part_sizes=part_sizes,
            part_weights=config.mixture_weights,
        )

    @property
    def num_samples(self) -> int:
        return sum(self.shard_sizes)

    @property
    def epoch_length(self) -> int:
        """Positions in an epoch."""
        return self.num_samples * self.num_repeats

    @property
    def name(self) -> str:
        """Identifies all that decides the order, beside fingerprint and seed."""
        repeats = f"*{self.num_repeats}/{self.global_batch_size}" if self.num_repeats > 1 else ""
        lanes = f"/{self.block_window}/{self.global_batch_size}" if self.kind == "block" else ""
        weights = ",".join(f"{weight:g}" for weight in self.part_weights)
        if len(weights) > _MAX_WEIGHTS:
            weights = hashlib.sha256(weights.encode()).hexdigest()[:16]
        parts = f"~{weights}" if self.part_sizes else ""
        return f"{self.kind}{lanes}{repeats}{parts}"

    def samples(self, epoch: int, positions: Indices) -> Indices:
        """Sample indices at `positions` of `epoch`. Positions past the end wrap to the start of the same epoch."""
        return self._permutation(epoch)[self._place(positions)[0]]

    def repeats(self, positions: Indices) -> Indices:
        """Which of a sample's repeats, from 0, is at each of the positions."""
        return self._place(positions)[1]

    def _place(self, positions: Indices) -> tuple[Indices, Indices]:
        """Place in the permutation, and repeat, of each position.

        The repeats of a run of samples follow one another as wholes, so that neighbours in a batch differ: mixup of an
        image with itself would do nothing. A run and its repeats fill one global batch.
        """
        positions = positions % self.epoch_length
        run = max(self.global_batch_size // self.num_repeats, 1)
        start = positions // (run * self.num_repeats) * run
        length = np.minimum(run, self.num_samples - start)
        offset = positions - start * self.num_repeats
        return start + offset % length, offset // length

    def _permutation(self, epoch: int) -> Indices:
        # Two epochs are kept, because prefetching reads ahead over the end of one.
        if epoch not in self._cache:
            while len(self._cache) >= 2:
                del self._cache[next(iter(self._cache))]
            self._cache[epoch] = self._compute(epoch)
        return self._cache[epoch]

    def _compute(self, epoch: int) -> Indices:
        labels = (self.fingerprint, self.seed, epoch)
        if self.part_sizes:
            return self._mixed_order(epoch)
        if self.kind == "sequential":
            return np.arange(self.num_samples, dtype=np.int64)
        if self.kind == "full":
            return keyed_permutation(self.num_samples, "order", *labels)
        return _block_order(self.shard_sizes, self.global_batch_size, self.block_window, labels)

    def _mixed_order(self, epoch: int) -> Indices:
        """As many positions as samples, shared by weight; each set continues where it was an epoch ago."""
        sizes, weights = self.part_sizes, self.part_weights or self.part_sizes
        edges = np.rint(np.cumsum([0.0, *weights]) / sum(weights) * self.num_samples).astype(np.int64)
        counts = np.diff(edges).tolist()
        order = np.empty(self.num_samples, dtype=np.int64)
        part_of = self._parts_in_turn(counts, epoch)
        first = 0
        for part, (size, count) in enumerate(zip(sizes, counts, strict=True)):
            start, end = epoch * count, (epoch + 1) * count
            rounds = range(start // size, -(-end // size))
            draws = [self._round_of_part(part, number) for number in rounds]
            offset = start - rounds.start * size
            order[part_of == part] = first + np.concatenate([np.empty(0, np.int64), *draws])[offset : offset + count]
            first += size
        return order

    def _parts_in_turn(self, counts: list[int], epoch: int) -> Indices:
        """Which set each position of an epoch takes its sample from: `counts` of each, shuffled or evenly spread."""
        parts = np.repeat(np.arange(len(counts)), counts)
        if self.kind == "sequential":
            shares = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
            return parts[np.argsort(shares, kind="stable")]
        return parts[keyed_permutation(self.num_samples, "mixture", self.fingerprint, self.seed, epoch)]

    def _round_of_part(self, part: int, number: int) -> Indices:
        """The order of the samples of one set in its round `number`."""
        size, labels = self.part_sizes[part], ("mixture-part", self.fingerprint, self.seed, part, number)
        if self.kind == "sequential":
            return np.arange(size, dtype=np.int64)
        if self.kind == "full":
            return keyed_permutation(size, *labels)
        ends = np.cumsum(self.shard_sizes)
        bounds = np.searchsorted(ends, np.cumsum([0, *self.part_sizes])[part : part + 2], side="right")
        # One lane: a set has no part of its own in a global batch that ranks could share out.
        return _block_order(self.shard_sizes[bounds[0] : bounds[1]], 1, self.block_window, labels)


def _block_order(
    shard_sizes: Sequence[int], global_batch_size: int, window: int, labels: tuple[str | int, ...]
) -> Indices:
    """Shuffled shards, cut into lanes of equal length; every global batch takes an equal part from each lane in turn.

    The number of lanes is the largest power of two, at most 64, that divides the global batch: it does not depend
    on the number of ranks, and each of up to 64 ranks (a power of two) reads lanes of its own. In a lane a sample
    moves by less than `window` places. What the lanes have beyond whole global batches comes last.
    """
    starts = np.concatenate([[0], np.cumsum(shard_sizes)]).astype(np.int64)
    shards = keyed_permutation(len(shard_sizes), "block-shards", *labels)
    stored = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shards])
    num_samples = len(stored)
    num_lanes = int(np.gcd(global_batch_size, MAX_LANES))
    bounds = np.arange(num_lanes + 1) * num_samples // num_lanes
    moved = np.arange(num_samples) + window * keyed_uniforms(num_samples, "block-window", *labels)
    lanes = []
    for start, end in pairwise(bounds):
        lanes.append(stored[start:end][np.argsort(moved[start:end], kind="stable")])
    part = global_batch_size // num_lanes
    whole = num_samples // num_lanes // part * part
    batches = np.stack([lane[:whole].reshape(-1, part) for lane in lanes], axis=1)
    return np.concatenate([batches.reshape(-1), *[lane[whole:] for lane in lanes]])


def steps_per_epoch(epoch_length: int, global_batch_size: int, last: LastBatch) -> int:
    """Global batches in an epoch that is read from its start."""
    if last == "drop":
        return epoch_length // global_batch_size
    return -(-epoch_length // global_batch_size)


def advance(
    epoch: int, position: int, *, epoch_length: int, global_batch_size: int, last: LastBatch
) -> tuple[int, int]:
    """(epoch, position) where the next global batch begins: here, or at the start of the next epoch.

    `drop` leaves out a last batch that is not full; `pad` fills it with the first samples of the same epoch.
    """
    needed = global_batch_size if last == "drop" else 1
    if position + needed > epoch_length:
        return epoch + 1, 0
    return epoch, position


def rank_positions(
    position: int, *, rank: int, world_size: int, micro_batch_size: int, grad_accum_steps: int
) -> Indices:
    """Positions (grad_accum_steps, micro_batch_size) of `rank` in the global batch that begins at `position`."""
    per_rank = micro_batch_size * grad_accum_steps
    assert 0 <= rank < world_size
    start = position + rank * per_rank
    return np.arange(start, start + per_rank, dtype=np.int64).reshape(grad_accum_steps, micro_batch_size)
