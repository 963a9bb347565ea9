"""A figure of a shard set: how large its images are and how its classes are filled."""

from pathlib import Path

import numpy as np

from data_pipelines.shards.index import open_shards

_MOST_NAMES = 40


def plot_shards(folder: str | Path, path: Path) -> None:
    """Writes the figure to `path`; its ending (.png, .svg, .pdf) says the format. Raises ValueError for another one."""
    # pyplot would keep the figure alive and choose a window system.
    from matplotlib.figure import Figure

    shards = open_shards(folder, allow_remote=True)
    counts = np.bincount(shards.label, minlength=shards.num_classes)
    by_size = np.argsort(-counts, kind="stable")
    num_named = min(len(counts), _MOST_NAMES)
    figure = Figure(figsize=(12, max(3.5, 0.2 * num_named)), layout="constrained")
    sizes, bytes_axis, classes = figure.subplots(1, 3)
    sizes.hist(np.minimum(shards.width, shards.height), bins=50)
    sizes.set(title=f"{shards.num_samples:,} images", xlabel="short side (pixels)", ylabel="images")
    bytes_axis.hist(shards.length / 1024, bins=50)
    bytes_axis.set(title="file size", xlabel="KiB", ylabel="images")
    # Of many classes only the largest and the smallest have room for their names.
    shown = np.concatenate([by_size[: num_named - num_named // 2], by_size[len(counts) - num_named // 2 :]])
    # A name may hold what no font shows, and dollars, which begin a formula.
    names = [ascii(shards.class_names[index])[1:-1][:24].replace("$", r"\$") for index in shown]
    classes.barh(range(num_named), counts[shown])
    classes.set_yticks(range(num_named), names)
    classes.invert_yaxis()
    which = "" if num_named == len(counts) else f", the {num_named} largest and smallest"
    classes.set(title=f"{shards.num_classes:,} classes{which}", xlabel="images")
    figure.savefig(path, dpi=120)
