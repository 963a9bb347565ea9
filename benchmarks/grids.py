"""Speed of making mazes and products: `python -m benchmarks.grids`, into benchmarks/results/grids.json.

Processor time of one process that makes, encodes, checks and writes whole shard sets; the median of the rounds counts.
"""

import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

from data_pipelines.grids.made import GridOptions
from data_pipelines.writing.write import WriteConfig, write_shards

NUM_ROUNDS = 5
CASES = {
    "reach, 15 px": GridOptions(puzzle="reach", count=1000, smallest=15, largest=15),
    "twins, 15 px": GridOptions(puzzle="twins", count=1000, smallest=15, largest=15),
    "path, 15 px": GridOptions(puzzle="path", count=1000, smallest=15, largest=15),
    "twins, 39 px": GridOptions(puzzle="twins", count=200, smallest=39, largest=39),
    "twins, 59 px, braid 0.1": GridOptions(puzzle="twins", count=100, smallest=59, largest=59, braid=0.1),
    "a5, 8 px": GridOptions(puzzle="a5", count=1000, smallest=8, largest=8),
}


def samples_per_s(options: GridOptions) -> float:
    """Of one core, the median of the rounds."""
    kind, found = "mazes" if options.is_maze else "products", []
    for _ in range(NUM_ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            write_shards(WriteConfig(kind=kind, source=options), Path(folder) / "set")
            found.append(options.count / (time.process_time() - start))
    return round(statistics.median(found))


def main() -> None:
    """Measure all cases and keep the numbers."""
    numbers = {name: samples_per_s(options) for name, options in CASES.items()}
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    record = {"cpu": model.partition(": ")[2], "python": platform.python_version(), "samples_per_s_and_core": numbers}
    text = json.dumps(record, indent=2) + "\n"
    (Path(__file__).parent / "results" / "grids.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
