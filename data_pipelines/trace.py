"""Which samples a rank reads, without reading them: anyone can check the order of a run."""

from collections.abc import Iterator

from data_pipelines.config import DataConfig, LastBatch
from data_pipelines.index import ShardSet
from data_pipelines.order import Order, advance, rank_positions


def trace_keys(
    shards: ShardSet,
    config: DataConfig,
    *,
    world_size: int,
    rank: int,
    seed: int,
    epoch: int,
    position: int,
    count: int | None,
    global_batch_size: int,
) -> Iterator[str]:
    """Keys of the next `count` samples of `rank` (null: all), from the global batch at `position` to the epoch's end.

    Of `config`, only order, last, block_window and num_repeats matter. `position` counts samples of all ranks from
    the start of the epoch. Fewer keys come where the epoch ends before.
    """
    _check(world_size, rank, epoch, position, count, global_batch_size)
    sequence = Order.of(shards, config, seed=seed, global_batch_size=global_batch_size)
    length = sequence.epoch_length
    if global_batch_size > length:
        raise ValueError(
            f"{shards.folder}: an epoch has {length} samples, fewer than a global batch of {global_batch_size}"
        )
    return _keys(
        shards, sequence, config.last, world_size=world_size, rank=rank, epoch=epoch, position=position, count=count
    )


def _keys(
    shards: ShardSet,
    sequence: Order,
    last: LastBatch,
    *,
    world_size: int,
    rank: int,
    epoch: int,
    position: int,
    count: int | None,
) -> Iterator[str]:
    global_batch_size, length = sequence.global_batch_size, sequence.epoch_length
    while count is None or count > 0:
        at = advance(epoch, position, epoch_length=length, global_batch_size=global_batch_size, last=last)
        if at != (epoch, position):
            return
        positions = rank_positions(
            position,
            rank=rank,
            world_size=world_size,
            micro_batch_size=global_batch_size // world_size,
            grad_accum_steps=1,
        )[0]
        yield from (shards.key(index) for index in sequence.samples(epoch, positions[:count]).tolist())
        count = None if count is None else max(count - len(positions), 0)
        position += global_batch_size


def _check(world_size: int, rank: int, epoch: int, position: int, count: int | None, global_batch_size: int) -> None:
    smallest = {"world size": (world_size, 1), "epoch": (epoch, 0), "position": (position, 0), "count": (count or 0, 0)}
    for name, (value, least) in {**smallest, "global batch": (global_batch_size, 1)}.items():
        if value < least:
            raise ValueError(f"{name} {value}: expected {least} or more")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank}: expected 0 to {world_size - 1} for a world of {world_size}")
    if global_batch_size % world_size:
        raise ValueError(f"global batch {global_batch_size}: {world_size} ranks cannot share it equally")
