"""A user's own transform of each view, named `module:function` in the configuration, never in data.

It is called as `function(image_CHW, seed)` with uint8 pixels (3, H, W) as a numpy array and a seed that is a function
of the view, and returns uint8 pixels of the same shape. Threads run it well when it releases the interpreter lock;
`data.worker_kind=processes` is for those that do not.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.keyed_random import keyed_words

Transform = Callable[[NDArray[np.uint8], int], NDArray[np.uint8]]


class TransformError(ValueError):
    """A user's transform that raised, or returned something else than pixels of the shape that it was given."""


def import_of_user(name: str) -> ModuleType:
    """A module that the user named: from where ours are (PYTHONPATH), then from the working folder.

    That folder comes last, and only from here on, so that no file of it takes the place of a library's module.
    """
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def load_transform(name: str) -> Transform:
    """The function `module:function`. Raises ValueError with what is wrong with the name."""
    module_name, _, function_name = name.partition(":")
    try:
        module = import_of_user(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"data.transform {name}: no module {error.name}; expected module:function, importable from "
            "PYTHONPATH or the working folder"
        ) from error
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"data.transform {name}: {module.__name__} has no function {function_name!r}")
    return function


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
