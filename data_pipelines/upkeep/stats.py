"""Facts about a shard set, from its index alone."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.image.map_png import map_names
from data_pipelines.shards.index import open_shards


def summarize_shards(folder: str | Path) -> dict[str, Any]:
    """Counts, bytes, pixels and class balance, ready for JSON."""
    shards = open_shards(folder, allow_remote=True)
    pairs_or_windows = ("source_bytes", "target_bytes") if shards.is_pairs else ("window_bytes", "that_count")
    sizes = pairs_or_windows if shards.is_text else ("width", "height")
    counts = np.bincount(shards.label, minlength=shards.num_classes).tolist()
    return {
        "folder": str(folder),
        "samples": shards.num_samples,
        "classes": shards.num_classes,
        "shards": shards.num_shards,
        "members": " ".join(["text" if shards.is_text else "image", *shards.members]),
        "left_out": shards.manifest.num_rejected,
        "bytes": int(shards.length.sum()),
        "tar_bytes": sum(shard.bytes for shard in shards.manifest.shards),
        sizes[0]: _spread(shards.width),
        sizes[1]: _spread(shards.height),
        "fingerprint": shards.fingerprint,
        # Classes of maps are of pixels: of those the index knows nothing.
        "class_counts": {} if map_names(shards.members) else dict(zip(shards.class_names, counts, strict=True)),
        "writer": dict(shards.manifest.writer),
    }


def _spread(values: NDArray[np.int32]) -> dict[str, int]:
    if not len(values):
        return {"smallest": 0, "median": 0, "largest": 0}
    return {"smallest": int(values.min()), "median": int(np.median(values)), "largest": int(values.max())}
