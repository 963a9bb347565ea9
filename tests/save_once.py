"""Saves one checkpoint: `python -m tests.save_once FOLDER STEP`. The fault suite crashes it at every file call."""

import sys
from pathlib import Path

import torch

from sret_scale.train.checkpoint import prune_checkpoints, save_checkpoint


def main(folder: Path, step: int) -> None:
    tensors = {"weights": {"a": torch.full((64, 64), float(step))}, "optimizer": {"m": torch.full((64,), float(step))}}
    save_checkpoint(folder, step=step, tensors=tensors, state={"images": step})
    prune_checkpoints(folder, 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
