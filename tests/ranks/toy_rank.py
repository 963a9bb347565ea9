"""A rank for tests of the launcher: `python -m tests.ranks.toy_rank FILE`, whose first line says it."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType


def finish(folder: Path, state: str, exit_code: int) -> None:
    """What rank 0 of a real run writes at its end."""
    if os.environ["RANK"] == "0":
        (folder / "status.json").write_text(json.dumps({"state": state, "exit_code": exit_code}))


def all_reduce(folder: Path, interval_s: float = 0.0) -> None:
    """Meets the other ranks over gloo; each writes where it listens, and the sum of all once or again and again."""
    import psutil
    import torch
    import torch.distributed as dist

    from sret_scale.train.distributed import join_ranks, ranks_from_environment

    join_ranks(ranks_from_environment(), "gloo")
    sockets = psutil.Process().net_connections("tcp")
    listens = {found.laddr.ip for found in sockets if found.status == psutil.CONN_LISTEN}
    (folder / f"listens-{os.environ['RANK']}").write_text(" ".join(sorted(listens)))
    while True:
        value = torch.tensor(float(os.environ["RANK"]) + 1)
        dist.all_reduce(value)
        (folder / f"sum-{os.environ['RANK']}").write_text(str(value.item()))
        if interval_s == 0:
            break
        time.sleep(interval_s)
    dist.destroy_process_group()


def main(config: Path) -> None:
    """Acts as the file says; `config` lies in the run folder."""
    folder, action = config.parent, config.read_text().strip()
    rank = int(os.environ["RANK"])

    def on_stop(_number: int, _frame: FrameType | None) -> None:
        # The agent passes on what the rank may have got by itself; Python's end would take the second as a death.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        finish(folder, "stopped", 0)
        sys.exit(0)

    signal.signal(signal.SIGTERM, on_stop)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    print(f"hello from rank {rank}", flush=True)
    if action == "all_reduce":
        all_reduce(folder)
    if action == "fail":
        if rank == 1:
            time.sleep(0.5)
            raise RuntimeError("the first error")
        time.sleep(1.5)
        raise RuntimeError("a later error, caused by the first")
    if action == "mistake":
        raise ValueError("expected this, got that")
    if action == "all_reduce_forever":
        all_reduce(folder, interval_s=0.1)
    if action == "sleep":
        time.sleep(120)
    finish(folder, "finished", 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
