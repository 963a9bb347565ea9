"""A figure of a shard set: how large its images are and how its classes are filled."""

from pathlib import Path

import numpy as np

from data_pipelines.shards.index import open_shards


def plot_shards(folder: str | Path, path: Path) -> None:
    """Writes the figure to `path`; its ending (.png, .svg, .pdf) says the format. Raises ValueError for another one."""
    # pyplot would keep the figure alive and choose a window system.
    from matplotlib.figure import Figure

    shards = open_shards(folder)
    counts = np.sort(np.bincount(shards.label, minlength=shards.num_classes))[::-1]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    sizes, bytes_axis, classes = figure.subplots(1, 3)
    sizes.hist(np.minimum(shards.width, shards.height), bins=50)
    sizes.set(title=f"{shards.num_samples:,} images", xlabel="short side (pixels)", ylabel="images")
    bytes_axis.hist(shards.length / 1024, bins=50)
    bytes_axis.set(title="file size", xlabel="KiB", ylabel="images")
    classes.plot(counts, drawstyle="steps-mid")
    classes.set(title=f"{shards.num_classes:,} classes", xlabel="class, by size", ylabel="images")
    classes.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
