"""Which samples a rank reads, without reading them: anyone can check the order of a run."""

from collections.abc import Iterator

from data_pipelines.index import ShardSet
from data_pipelines.loader import DataConfig, shard_order
from data_pipelines.order import advance, rank_positions


def trace_keys(
    shards: ShardSet,
    config: DataConfig,
    *,
    world_size: int,
    rank: int,
    seed: int,
    epoch: int,
    position: int,
    count: int,
    global_batch_size: int,
) -> Iterator[str]:
    """Keys of the next `count` samples of `rank`, from the global batch that begins at `position` to the epoch's end.

    Of `config`, only order, last, block_window and num_repeats matter. `position` counts samples of all ranks from
    the start of the epoch. Fewer keys come where the epoch ends before.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank}: expected 0 to {world_size - 1} for a world of {world_size}")
    if global_batch_size % world_size:
        raise ValueError(f"global batch {global_batch_size}: {world_size} ranks cannot share it equally")
    if global_batch_size > shards.num_samples:
        raise ValueError(f"global batch {global_batch_size}: the shard set has only {shards.num_samples} samples")
    for name, value in (("epoch", epoch), ("position", position), ("count", count)):
        if value < 0:
            raise ValueError(f"{name} {value}: expected 0 or more")
    sequence = shard_order(shards, config, seed=seed, global_batch_size=global_batch_size)
    length = sequence.epoch_length
    while count > 0:
        at = advance(epoch, position, epoch_length=length, global_batch_size=global_batch_size, last=config.last)
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
        count -= len(positions)
        position += global_batch_size
