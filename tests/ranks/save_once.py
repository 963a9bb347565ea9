"""Saves checkpoints as a run does: `python -m tests.ranks.save_once` reads a line FOLDER STEP per save from its input.

Each save is made by a process of its own, forked after the imports: it prints its number, stops itself, saves when it
is continued, and its exit status is printed. So a fault can be injected into it that counts no call of the start-up.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

import torch

from sret_scale.train.checkpoint_writer import CheckpointWriter
from sret_scale.train.distributed import Ranks
from sret_scale.train.engine.snapshot import RankTensor, WholeTensor

PR_SET_PTRACER = 0x59616D61  # prctl(2)
MAIN = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


def tensors(step: int) -> list[RankTensor]:
    """Two sets, of which the optimizer's is a fragment over the ranks, filled with the step."""
    sizes = {"weights": (64, 64), "optimizer": (64,)}
    return [
        RankTensor(
            values=torch.full(size, float(step)),
            is_fragment=name == "optimizer",
            wholes=(WholeTensor(set_name=name, name="a", shape=torch.Size(size)),),
        )
        for name, size in sizes.items()
    ]


def save(folder: Path, step: int, *, keep: int = 1) -> None:
    """Raises OSError where the save failed."""
    with CheckpointWriter(folder, MAIN, keep=keep) as writer:
        writer.start(tensors(step), step=step, state={"images": step})


def save_when_continued(folder: Path, step: int) -> int:
    """What the forked process does; its exit status."""
    # Where the system lets only ancestors trace a process (Yama), strace is made an exception; elsewhere it is no-op.
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(-1))
    os.kill(os.getpid(), signal.SIGSTOP)
    try:
        save(folder, step)
    except OSError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    return 0


def main() -> None:
    for line in sys.stdin:
        folder, step = line.split()
        child = os.fork()
        if child == 0:
            os._exit(save_when_continued(Path(folder), int(step)))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
