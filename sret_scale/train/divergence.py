"""What a run does about a loss or gradient that is not finite: it leaves the update out, says so, and stops in time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_pipelines.shards.index import ShardSet
from data_pipelines.stream.loader import Step
from sret_scale.train.distributed import from_rank
from sret_scale.train.engine.clip import GradientNorms


class DivergedError(ArithmeticError):
    """The loss or the gradient is not a number any more."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """An update that was not made: why, and the keys of the samples of each rank it was due to."""

    reason: str
    samples: Mapping[str, list[str]]
    is_overflow: bool
    """True where fp16's loss scale was too large, which is how it finds its size."""


def left_out(
    step: Step, shards: ShardSet, *, rank_losses: Sequence[float], norms: GradientNorms, is_overflow: bool
) -> LeftOut:
    """What to say of an update that was left out; all ranks must call it, and get the same."""
    bad = {rank: loss for rank, loss in enumerate(rank_losses) if not math.isfinite(loss)}
    if bad:
        reason = "; ".join(f"the loss of rank {rank} is {loss}" for rank, loss in bad.items())
    else:
        classes = [kind for kind, norm in norms.by_class.items() if not math.isfinite(norm)]
        reason = f"the gradient of the class{'es' * (len(classes) > 1)} {', '.join(classes)} is not finite"
    # The gradient is summed over ranks: where all losses are finite, any rank's samples may have made it so.
    suspects = list(bad) or list(range(len(rank_losses)))
    keys = [shards.key(index) for batch in step.micro_batches for index in batch.indices.tolist()]
    samples = {str(rank): from_rank(keys, rank) for rank in suspects}
    return LeftOut(reason=reason, samples=samples, is_overflow=is_overflow)


def require_progress(skipped_steps: int, limit: int, what: LeftOut, *, samples: int) -> None:
    """Raise DivergedError where `limit` updates in a row have been left out."""
    if skipped_steps < limit:
        return
    rank, keys = next(iter(what.samples.items()))
    raise DivergedError(
        f"{what.reason} at {samples:,} samples seen, and {skipped_steps} updates in a row were left out "
        f"(train.max_skipped_steps={limit}; samples of rank {rank}: {', '.join(keys[:8])} ...). The weights are those "
        "before them. Lower optim.learning_rate, clip a class of parameters, or choose another branch scheme"
    )
