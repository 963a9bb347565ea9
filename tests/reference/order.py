"""The order of samples, slow and obvious."""

import hashlib


def permutation(num_samples: int, *labels: str | int) -> list[int]:
    """Samples sorted by one 64-bit little-endian word of SHAKE-128 each."""
    stream = hashlib.shake_128("/".join(map(str, labels)).encode()).digest(8 * num_samples)
    words = [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(num_samples)]
    return sorted(range(num_samples), key=lambda i: (words[i], i))


def epoch_batches(order: list[int], global_batch_size: int, last: str) -> list[list[int]]:
    """Global batches of one epoch: the last one dropped, or filled from the start of the epoch."""
    batches = []
    for start in range(0, len(order), global_batch_size):
        batch = order[start : start + global_batch_size]
        if len(batch) < global_batch_size and last == "drop":
            break
        batches.append([*batch, *order[: global_batch_size - len(batch)]])
    return batches


def rank_part(batch: list[int], rank: int, world_size: int, grad_accum_steps: int) -> list[list[int]]:
    """The micro batches of `rank`: its contiguous part of the global batch, cut again."""
    per_rank = len(batch) // world_size
    part = batch[rank * per_rank : (rank + 1) * per_rank]
    size = per_rank // grad_accum_steps
    return [part[i * size : (i + 1) * size] for i in range(grad_accum_steps)]


def block_order(
    shard_sizes: list[int], global_batch_size: int, window: int, labels: tuple[str | int, ...]
) -> list[int]:
    """Shuffled shards in equal lanes; in each lane samples sorted by place + window * uniform; lanes taken in turn."""
    starts = [sum(shard_sizes[:shard]) for shard in range(len(shard_sizes))]
    stored = []
    for shard in permutation(len(shard_sizes), "block-shards", *labels):
        stored += list(range(starts[shard], starts[shard] + shard_sizes[shard]))
    total = len(stored)
    stream = hashlib.shake_128("/".join(map(str, ("block-window", *labels))).encode()).digest(8 * total)
    keys = [i + window * ((int.from_bytes(stream[8 * i : 8 * i + 8], "little") >> 11) / 2**53) for i in range(total)]
    num_lanes = next(lanes for lanes in (64, 32, 16, 8, 4, 2, 1) if global_batch_size % lanes == 0)
    lanes: list[list[int]] = []
    for index in range(num_lanes):
        places = range(index * total // num_lanes, (index + 1) * total // num_lanes)
        lanes.append([stored[place] for place in sorted(places, key=lambda place: (keys[place], place))])
    part = global_batch_size // num_lanes
    order: list[int] = []
    while all(len(lane) >= part for lane in lanes) and len(order) < total // num_lanes // part * part * num_lanes:
        for lane in lanes:
            order += lane[:part]
            del lane[:part]
    return order + [sample for lane in lanes for sample in lane]
