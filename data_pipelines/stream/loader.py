"""Batches of one rank, as a function of (shards, config, seed, rank, world size, state).

    (epoch, position) -> sample index       order.py, pure: the same for any number of ranks
      -> bytes, checked                     reader.py
      -> uint8 RGB                          decode.py
      -> view: crop, resize, flip           view.py, pure per sample
      -> row of a uint8 batch               prefetch.py: threads (worker_batches.py: processes) fill it ahead of its use

The state is a position, so a run continues on any number of ranks, and every rank gets the same number of batches.
"""

import json
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, islice

import numpy as np

from data_pipelines.checked_files import parse_checked
from data_pipelines.config import DataConfig
from data_pipelines.image.map_png import map_names
from data_pipelines.remote.shard_sets import Prefetcher, bytes_by_cache, cache_of
from data_pipelines.shards.index import ShardSet
from data_pipelines.shards.mixture import MixedShardSet
from data_pipelines.stream.order import Indices, Order, advance, rank_positions, steps_per_epoch
from data_pipelines.stream.prefetch import PADDING, Batch, BatchFiller, PendingBatch
from data_pipelines.stream.quarantine import Quarantine
from data_pipelines.stream.reader import BadSampleError, ShardReader, sample_name
from data_pipelines.stream.samples import EvaluationSamples, TrainingSamples
from data_pipelines.stream.worker_batches import BadSamples, Task, worker_batches

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
        return parse_checked(text.encode(), cls, "state of the loader")


@dataclass(frozen=True, kw_only=True)
class Step:
    """The micro batches of one optimizer step, and the state after it."""

    micro_batches: list[Batch]
    next_state: LoaderState


@dataclass(frozen=True)
class TrainingSource:
    """What makes the training samples of a run; can be sent to a worker process, which calls it."""

    shards: ShardSet
    config: DataConfig
    seed: int

    def over(self, reader: ShardReader, on_bad_sample: Callable[[int, BadSampleError], None]) -> TrainingSamples:
        return TrainingSamples(
            reader,
            self.shards,
            self.config,
            seed=self.seed,
            on_bad_sample=on_bad_sample,
        )

    def __call__(self, bad_samples: BadSamples) -> TrainingSamples:
        """The samples of a worker process, whose end closes its files."""
        return self.over(ShardReader(self.shards), lambda epoch, error: bad_samples.append((epoch, error)))


class TrainLoader:
    """Endless training steps of one rank, `for step in loader.steps(state)`, or its batches, `for batch in loader`.

    `context`: bytes of a row, of shards of text; `image_size` is without use there.
    """

    def __init__(
        self,
        shards: ShardSet,
        config: DataConfig | None = None,
        *,
        micro_batch_size: int,
        image_size: int = 224,
        context: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        grad_accum_steps: int = 1,
    ) -> None:
        config = config or DataConfig()
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
        self._shards, self._config = shards, config
        self._image_size, self._context = image_size, context
        self._rank, self._world_size = rank, world_size
        self._micro_batch_size, self._grad_accum_steps = micro_batch_size, grad_accum_steps
        self._identity = LoaderState(fingerprint=shards.fingerprint[:32], seed=seed, order=self.order.name)
        self.quarantine = Quarantine(
            config.quarantine_file,
            max_bad_rate=config.max_bad_rate,
            samples_per_epoch=-(-epoch_length // world_size),
            rank=rank,
            world_size=world_size,
        )

    @property
    def num_bad_samples(self) -> int:
        """Different bad samples that this rank has met and replaced, earlier starts of the run included."""
        return self.quarantine.count

    def __iter__(self) -> Iterator[Batch]:
        return (batch for step in self.steps() for batch in step.micro_batches)

    def steps(self, state: LoaderState | None = None) -> Generator[Step]:
        """Endless. Threads work ahead until the iterator is closed or collected; what fails in one is raised here."""
        state = state or LoaderState()
        self.check(state)
        check_views(self._shards, self._config, self._image_size, self._context)
        return self._steps(state)

    def _steps(self, state: LoaderState) -> Generator[Step]:
        with ExitStack() as stack:
            tasks = self.tasks(state, stack)
            source = TrainingSource(self._shards, self._config, self.order.seed)
            if self._config.worker_kind == "processes":
                yield from self._of_processes(tasks, source)
                return
            reader = stack.enter_context(ShardReader(self._shards))
            filler = BatchFiller(
                source.over(reader, self.quarantine.add),
                row_shape=row_shape(self._shards, self._image_size, self._context),
                num_threads=self._config.workers,
                stall_s=self._config.stall_s,
                in_progress=reader.in_progress,
                maps=map_names(self._shards.members),
            )
            upcoming: deque[tuple[list[PendingBatch], LoaderState]] = deque()
            stack.enter_context(filler)
            while True:
                while (len(upcoming) - 1) * self._grad_accum_steps < self._config.prefetch_batches:
                    micro_batches, after = next(tasks)
                    upcoming.append(([filler.submit(*task) for task in micro_batches], after))
                pending, next_state = upcoming.popleft()
                yield Step(micro_batches=[batch.result() for batch in pending], next_state=next_state)

    def tasks(self, state: LoaderState, stack: ExitStack) -> Iterator[tuple[list[Task], LoaderState]]:
        """The micro batches of each step, and the state after it, endless; shards are fetched until `stack` ends."""
        fetch_ahead = self._fetch_ahead(state, stack)
        while True:
            epoch, positions, state = self._next_positions(state)
            next(fetch_ahead, None)
            samples = zip(self.order.samples(epoch, positions), self.order.repeats(positions), strict=True)
            yield [(epoch, *rows) for rows in samples], state

    def _of_processes(self, tasks: Iterator[tuple[list[Task], LoaderState]], source: TrainingSource) -> Generator[Step]:
        """The steps of `tasks`, without end."""
        states: deque[LoaderState] = deque()

        def of_steps() -> Iterator[Task]:
            for micro_batches, after in tasks:
                states.append(after)
                yield from micro_batches

        batches = worker_batches(
            source,
            of_steps(),
            row_shape=row_shape(self._shards, self._image_size, self._context),
            maps=tuple(map_names(self._shards.members)),
            num_workers=self._config.workers,
            prefetch_batches=self._config.prefetch_batches,
            stall_s=self._config.stall_s,
            on_bad_sample=self.quarantine.add,
            name_of=partial(sample_name, self._shards),
        )
        with closing(batches):
            while micro_batches := list(islice(batches, self._grad_accum_steps)):
                yield Step(micro_batches=micro_batches, next_state=states.popleft())

    def _fetch_ahead(self, state: LoaderState, stack: ExitStack) -> Iterator[None]:
        """Each `next` fetches the shards of one more step, `fetch_ahead_steps` before it; nothing for a local set."""
        steps = self._shards_of_steps(state)
        window = list(islice(steps, self._config.fetch_ahead_steps)) if self._is_remote else []
        if not window:
            return iter(())
        self._check_window(window)
        prefetcher = stack.enter_context(Prefetcher(self._shards, num_threads=self._config.fetch_threads))
        return map(prefetcher.want, chain([[shard for shards in window for shard in shards]], steps))

    @property
    def _is_remote(self) -> bool:
        parts = self._shards.parts if isinstance(self._shards, MixedShardSet) else (self._shards,)
        return any(cache_of(part) is not None for part in parts)

    def check_cache(self, state: LoaderState) -> None:
        """Raises ValueError unless the caches hold the shards of the steps that are fetched ahead, from `state` on."""
        if self._is_remote:
            self._check_window(list(islice(self._shards_of_steps(state), self._config.fetch_ahead_steps)))

    def _check_window(self, window: list[list[int]]) -> None:
        for cache, num_bytes in bytes_by_cache(self._shards, set().union(*window)).items():
            if num_bytes > cache.max_bytes:
                whose = f"rank {self._rank} of {self._world_size}"
                raise ValueError(
                    f"{self._shards.folder}: the next {len(window)} steps of {whose} read shards of {num_bytes:,} "
                    f"bytes, and the cache holds {cache.max_bytes:,}: raise data.cache_gib, use data.order=block with "
                    "a smaller data.block_window, or lower data.fetch_ahead_steps"
                )

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

    def check(self, state: LoaderState) -> None:
        """Raises ValueError where a state belongs to other shards, another seed or another order."""
        for name, what in (("fingerprint", "shards"), ("seed", "seed"), ("order", "order")):
            got, expected = getattr(state, name), getattr(self._identity, name)
            if got is not None and got != expected:
                raise ValueError(
                    f"{self._shards.folder}: the data position to resume from belongs to another {what} "
                    f"(expected {expected}, got {got}): resume with the {what} of the interrupted run"
                )


def check_node_cache(
    shards: ShardSet, config: DataConfig, *, seed: int, global_batch_size: int, num_nodes: int
) -> None:
    """Raises ValueError unless the cache of a node holds what all its ranks fetch ahead at the start of an epoch.

    The ranks of a node are neighbours, so together they read what one rank of `num_nodes` would read.
    """
    loader = TrainLoader(
        shards,
        replace(config, quarantine_file=None),
        image_size=1,
        seed=seed,
        rank=0,
        world_size=num_nodes,
        micro_batch_size=global_batch_size // num_nodes,
        grad_accum_steps=1,
    )
    loader.check_cache(LoaderState())


def row_shape(shards: ShardSet, image_size: int, context: int | None) -> tuple[int, ...]:
    """Of a sample in a batch: pixels, bytes of text, or those of both sides of a pair, as many as the longest has."""
    if shards.is_pairs:
        return 2, int(max(shards.width.max(initial=1), shards.height.max(initial=1)))
    return (3, image_size, image_size) if context is None else (context,)


def check_views(shards: ShardSet, config: DataConfig, image_size: int, context: int | None = None) -> None:
    """Raises ValueError unless maps are seen as their images are, and what is not resized fits: images, or text.

    `context`: bytes that a window of text may have; None where images are expected.
    """
    if shards.is_text != (context is not None):
        kinds = ("images", "text")
        raise ValueError(
            f"{shards.folder}: expected shards of {kinds[not shards.is_text]}, got shards of {kinds[shards.is_text]}: "
            "task=language reads text, task=translation pairs of it, other tasks images"
        )
    if context is not None:
        if config.transform:
            raise ValueError(f"{shards.folder}: text is not transformed: set data.transform=null")
        if not shards.is_pairs and (longest := int(shards.width.max(initial=0))) > context:
            raise ValueError(
                f"{shards.folder}: windows of {longest:,} bytes do not fit into a context of {context:,}: set "
                f"model.context={longest}, or write the shards with --window {context}"
            )
        return
    if map_names(shards.members) and (config.crop != "none" or config.transform):
        raise ValueError(
            f"{shards.folder}: images with label maps are used as they are stored: set data.crop=none and no"
            f" data.transform, got data.crop={config.crop} data.transform={config.transform or 'null'}"
        )
    if config.crop == "none" and shards.num_samples:
        side = np.maximum(shards.width, shards.height)
        if side[index := int(side.argmax())] > image_size:
            raise ValueError(
                f"{sample_name(shards, index)}: {shards.width[index]} x {shards.height[index]} pixels do not fit into"
                f" {image_size} x {image_size} without resizing (data.crop=none): set model.image_size={side[index]}"
            )


def evaluation_batches(
    shards: ShardSet,
    config: DataConfig,
    *,
    image_size: int = 224,
    context: int | None = None,
    batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[Batch]:
    """Every sample exactly once over all ranks, in the order of the shards; the same number of batches on every rank.

    The batches at the end are padded with rows whose `valid` is False; a batch may consist of them.
    """
    check_views(shards, config, image_size, context)
    global_batch_size = batch_size * world_size
    num_batches = -(-shards.num_samples // global_batch_size)
    upcoming: deque[PendingBatch] = deque()
    with ShardReader(shards) as reader:
        source = EvaluationSamples(reader, shards, config)
        filler = BatchFiller(
            source,
            row_shape=row_shape(shards, image_size, context),
            num_threads=config.workers,
            stall_s=config.stall_s,
            in_progress=reader.in_progress,
            maps=map_names(shards.members),
        )
        with filler:
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
