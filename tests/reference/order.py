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
