"""Batches of one rank, as a function of (shards, config, seed, rank, world size, state).

    (epoch, position) -> sample index       order.py, pure: the same for any number of ranks
      -> bytes, checked                     reader.py
      -> uint8 RGB                          decode.py
      -> view: crop, resize, flip           view.py, pure per sample
      -> row of a uint8 batch               batches.py: threads fill it ahead of its use

The state is a position, so a run continues on any number of ranks, and every rank gets the same number of batches.
"""

import json
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice

import numpy as np

from data_pipelines.batches import PADDING, Batch, BatchFiller, PendingBatch
from data_pipelines.config import DataConfig
from data_pipelines.index import ShardSet
from data_pipelines.order import Indices, Order, advance, rank_positions, steps_per_epoch
from data_pipelines.quarantine import Quarantine
from data_pipelines.reader import ShardReader
from data_pipelines.remote import Prefetcher, cache_of
from data_pipelines.samples import EvaluationSamples, TrainingSamples

__all__ = ["Batch", "DataConfig", "LoaderState", "Step", "TrainLoader", "evaluation_batches"]


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """Where the next global batch begins.

    `fingerprint`, `seed` and `order` are filled in by the loader, which refuses to continue from a state that
    belongs to other shards, another seed or another order.
    """

    epoch: int = 0
    position: int = 0
    fingerprint: str | None = None
    seed: int | None = None
    order: str | None = None

    def to_json(self) -> str:
        """Less than 200 bytes."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "LoaderState":
        return cls(**json.loads(text))


@dataclass(frozen=True, kw_only=True)
class Step:
    """The micro batches of one optimizer step, and the state after it."""

    micro_batches: list[Batch]
    next_state: LoaderState


class TrainLoader:
    """Endless training steps of one rank: `for step in loader.steps(state)`."""

    def __init__(
        self,
        shards: ShardSet,
        config: DataConfig,
        *,
        image_size: int,
        seed: int,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        grad_accum_steps: int,
    ) -> None:
        self.global_batch_size = micro_batch_size * grad_accum_steps * world_size
        self.order = Order.of(shards, config, seed=seed, global_batch_size=self.global_batch_size)
        epoch_length = self.order.epoch_length
        if self.global_batch_size > epoch_length:
            raise ValueError(
                f"{shards.folder}: an epoch has {epoch_length} samples, fewer than one global batch of "
                f"{self.global_batch_size} ({world_size} ranks x micro batch {micro_batch_size} x {grad_accum_steps} "
                "accumulation steps): use fewer ranks, a smaller batch, or more data"
            )
        self.steps_per_epoch = steps_per_epoch(epoch_length, self.global_batch_size, config.last)
        self._shards, self._config, self._image_size = shards, config, image_size
        self._rank, self._world_size = rank, world_size
        self._micro_batch_size, self._grad_accum_steps = micro_batch_size, grad_accum_steps
        self._identity = LoaderState(fingerprint=shards.fingerprint[:32], seed=seed, order=self.order.name)
        self._quarantine = Quarantine(
            config.quarantine_file, max_bad_rate=config.max_bad_rate, samples_per_epoch=-(-epoch_length // world_size)
        )

    @property
    def num_bad_samples(self) -> int:
        """Different bad samples that this rank has met and replaced since it was started."""
        return self._quarantine.count

    def steps(self, state: LoaderState) -> Generator[Step]:
        """Endless. Threads work ahead until the iterator is closed or collected; what fails in one is raised here."""
        self._check(state)
        return self._steps(state)

    def _steps(self, state: LoaderState) -> Generator[Step]:
        upcoming: deque[tuple[list[PendingBatch], LoaderState]] = deque()
        with ExitStack() as stack:
            reader = stack.enter_context(ShardReader(self._shards))
            fetch_ahead = self._fetch_ahead(state, stack)
            source = TrainingSamples(
                reader,
                self._shards,
                self._config,
                image_size=self._image_size,
                seed=self.order.seed,
                quarantine=self._quarantine,
            )
            filler = stack.enter_context(
                BatchFiller(source, image_size=self._image_size, num_threads=self._config.workers)
            )
            while True:
                while (len(upcoming) - 1) * self._grad_accum_steps < self._config.prefetch_batches:
                    epoch, positions, state = self._next_positions(state)
                    next(fetch_ahead, None)
                    samples = zip(self.order.samples(epoch, positions), self.order.repeats(positions), strict=True)
                    upcoming.append(([filler.submit(epoch, *rows) for rows in samples], state))
                pending, next_state = upcoming.popleft()
                yield Step(micro_batches=[batch.result() for batch in pending], next_state=next_state)

    def _fetch_ahead(self, state: LoaderState, stack: ExitStack) -> Iterator[None]:
        """Each `next` fetches the shards of one more step, `fetch_ahead_steps` before it; nothing for a local set."""
        cache = cache_of(self._shards)
        if cache is None:
            return iter(())
        steps = self._shards_of_steps(state)
        window = list(islice(steps, self._config.fetch_ahead_steps))
        entries = self._shards.manifest.shards
        num_bytes = sum(entries[shard].bytes for shard in set().union(*window))
        if num_bytes > cache.max_bytes:
            raise ValueError(
                f"{self._shards.folder}: the next {len(window)} steps of one rank read shards of {num_bytes:,} bytes, "
                f"and the cache holds {cache.max_bytes:,}: raise data.cache_gib, use data.order=block with a smaller "
                "data.block_window, or lower data.fetch_ahead_steps"
            )
        prefetcher = stack.enter_context(Prefetcher(cache, num_threads=self._config.fetch_threads))
        return map(prefetcher.want, chain([[shard for shards in window for shard in shards]], steps))

    def _shards_of_steps(self, state: LoaderState) -> Iterator[list[int]]:
        """The shards that this rank reads in each step, in order of use, without end."""
        while True:
            epoch, positions, state = self._next_positions(state)
            indices = self.order.samples(epoch, positions).ravel()
            yield list(dict.fromkeys(self._shards.shard_of[indices].tolist()))

    def _next_positions(self, state: LoaderState) -> tuple[int, Indices, LoaderState]:
        """Epoch, positions (grad_accum_steps, micro_batch_size) of the next global batch, and the state after it."""
        epoch, position = advance(
            state.epoch,
            state.position,
            epoch_length=self.order.epoch_length,
            global_batch_size=self.global_batch_size,
            last=self._config.last,
        )
        positions = rank_positions(
            position,
            rank=self._rank,
            world_size=self._world_size,
            micro_batch_size=self._micro_batch_size,
            grad_accum_steps=self._grad_accum_steps,
        )
        after = replace(self._identity, epoch=epoch, position=position + self.global_batch_size)
        return epoch, positions, after

    def _check(self, state: LoaderState) -> None:
        for name, what in (("fingerprint", "shards"), ("seed", "seed"), ("order", "order")):
            got, expected = getattr(state, name), getattr(self._identity, name)
            if got is not None and got != expected:
                raise ValueError(
                    f"{self._shards.folder}: the data position to resume from belongs to another {what} "
                    f"(expected {expected}, got {got}): resume with the {what} of the interrupted run"
                )


def evaluation_batches(
    shards: ShardSet, config: DataConfig, *, image_size: int, batch_size: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """Every sample exactly once over all ranks, in the order of the shards; the same number of batches on every rank.

    The batches at the end are padded with rows whose `valid` is False; a batch may consist of them.
    """
    global_batch_size = batch_size * world_size
    num_batches = -(-shards.num_samples // global_batch_size)
    upcoming: deque[PendingBatch] = deque()
    with ShardReader(shards) as reader:
        source = EvaluationSamples(reader, shards, config, image_size)
        with BatchFiller(source, image_size=image_size, num_threads=config.workers) as filler:
            for batch in range(num_batches):
                positions_B = rank_positions(
                    batch * global_batch_size,
                    rank=rank,
                    world_size=world_size,
                    micro_batch_size=batch_size,
                    grad_accum_steps=1,
                )[0]
                indices_B = np.where(positions_B < shards.num_samples, positions_B, PADDING)
                upcoming.append(filler.submit(0, indices_B, np.zeros_like(indices_B)))
                if len(upcoming) > config.prefetch_batches:
                    yield upcoming.popleft().result()
            while upcoming:
                yield upcoming.popleft().result()
