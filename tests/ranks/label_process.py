"""One rank that writes soft labels, to be killed: `python -m tests.ranks.label_process SHARDS STORE RANK WORLD`."""

import sys
from pathlib import Path

from sret_scale.distill.label_writer import write_labels
from tests.distill.distill_shards import make_job, make_shards

if __name__ == "__main__":
    shards, store, rank, world_size = sys.argv[1:]
    job = make_job(Path(store), make_shards(Path(shards)))
    write_labels(job, rank=int(rank), world_size=int(world_size), report=print)
