"""Which samples a rank reads, without reading them: anyone can check the order of a run."""

from collections.abc import Iterator

from data_pipelines.config import LastBatch
from data_pipelines.shards.index import ShardSet
from data_pipelines.stream.order import Order, advance, rank_positions


def trace_keys(
    shards: ShardSet,
    order: Order,
    *,
    last: LastBatch,
    world_size: int,
    rank: int,
    epoch: int = 0,
    position: int = 0,
    count: int | None = None,
) -> Iterator[str]:
    """Keys of the next `count` samples of `rank` (None: all), from the global batch at `position` to the epoch's end.

    `position` counts samples of all ranks from the start of the epoch. Fewer keys come where the epoch ends before.
    """
    global_batch_size, length = order.global_batch_size, order.epoch_length
    _check(global_batch_size, world_size, rank, {"epoch": epoch, "position": position, "count": count or 0})
    if global_batch_size > length:
        raise ValueError(
            f"{shards.folder}: an epoch has {length} samples, fewer than a global batch of {global_batch_size}"
        )
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
        yield from (shards.key(index) for index in order.samples(epoch, positions[:count]).tolist())
        count = None if count is None else max(count - len(positions), 0)
        position += global_batch_size


def _check(global_batch_size: int, world_size: int, rank: int, counts: dict[str, int]) -> None:
    smallest = {"world size": (world_size, 1), "global batch": (global_batch_size, 1)}
    for name, (value, least) in {**smallest, **{name: (value, 0) for name, value in counts.items()}}.items():
        if value < least:
            raise ValueError(f"{name} {value}: expected {least} or more")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank}: expected 0 to {world_size - 1} for a world of {world_size}")
    if global_batch_size % world_size:
        raise ValueError(f"global batch {global_batch_size}: {world_size} ranks cannot share it equally")
