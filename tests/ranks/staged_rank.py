"""A rank that writes down where its packages come from: `python -m tests.ranks.staged_rank FILE`."""

import os
import sys
from pathlib import Path

import deepspeed
import torch

import sret_scale.train.main
from tests.ranks.toy_rank import finish

if __name__ == "__main__":
    folder = Path(sys.argv[1]).parent
    files = [str(module.__file__) for module in (torch, deepspeed, sret_scale.train.main)]
    (folder / f"imported-{os.environ['RANK']}").write_text("\n".join(files))
    finish(folder, "finished", 0)
