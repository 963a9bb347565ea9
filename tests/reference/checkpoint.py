"""The plain twin of sret_scale.memory: torch's own non-reentrant checkpoint, one level or nested."""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.utils.checkpoint import checkpoint

Chain = Sequence[Callable[[Tensor], Tensor]]


def run_plain(applications: Chain, x: Tensor) -> Tensor:
    """One application after another; autograd keeps everything."""
    for application in applications:
        x = application(x)
    return x


def run_per_application(applications: Chain, x: Tensor) -> Tensor:
    """Every application is its own checkpoint."""
    for application in applications:
        x = checkpoint(application, x, use_reentrant=False)
    return x


def run_segments(applications: Chain, x: Tensor, length: int) -> Tensor:
    """Checkpoints of `length` applications each; a segment is taped as a whole when it runs again."""
    for lo in range(0, len(applications), length):
        x = checkpoint(run_plain, applications[lo : lo + length], x, use_reentrant=False)
    return x


def run_nested(applications: Chain, x: Tensor, length: int) -> Tensor:
    """Checkpoints of `length` applications each, with a checkpoint around each application inside."""
    for lo in range(0, len(applications), length):
        x = checkpoint(run_per_application, applications[lo : lo + length], x, use_reentrant=False)
    return x
