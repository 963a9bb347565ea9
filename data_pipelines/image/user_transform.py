"""A user's own transform of each view, named `module:function` in the configuration, never in data.

It is called as `function(image_CHW, seed)` with uint8 pixels (3, H, W) as a numpy array and a seed that is a function
of the view, and returns uint8 pixels of the same shape. Threads run it well when it releases the interpreter lock;
`data.worker_kind=processes` is for those that do not.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from data_pipelines.keyed_random import keyed_words

Transform = Callable[[NDArray[np.uint8], int], NDArray[np.uint8]]


class TransformError(ValueError):
    """A user's transform that raised, or returned something else than pixels of the shape that it was given."""


def apply_transform(
    name: str, function: Transform, pixels_CHW: NDArray[np.uint8], *, sample: str, labels: tuple[int, ...]
) -> None:
    """Transforms pixels where they are. `labels` decide the seed, `sample` is named by TransformError."""
    seed = int(keyed_words(1, "transform", *labels)[0] >> np.uint64(1))
    try:
        # A copy, because a transform may keep what it is given, and this memory will hold other pixels.
        result = function(pixels_CHW.copy(), seed)
    except Exception as error:
        # Whatever a user's function raises ends the run, and names the sample; a worker process could not send it.
        raise TransformError(f"data.transform {name}: {sample}: {type(error).__name__}: {error}") from error
    shape = pixels_CHW.shape
    if not isinstance(result, np.ndarray) or result.dtype != np.uint8 or result.shape != shape:
        got = f"{result.dtype} {result.shape}" if isinstance(result, np.ndarray) else type(result).__name__
        raise TransformError(f"data.transform {name}: {sample}: expected uint8 {shape}, got {got}")
    pixels_CHW[...] = result
