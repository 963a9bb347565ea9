"""The one door to torchvision.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch its import fails, because its compiled operators
do not load and its Python code registers shapes for two of them. Declaring those two schemas is enough for the
transforms, which are plain torch. A healthy torchvision imports at the first try and is left as it is.
"""

import sys
from importlib import import_module
from types import ModuleType

import torch

# The declared schemas live as long as this object.
_DECLARED: list[torch.library.Library] = []


def _import_torchvision() -> ModuleType:
    """torchvision, with `nms` and `qnms` declared (not implemented) where its own operators cannot be loaded."""
    try:
        return import_module("torchvision")
    except ModuleNotFoundError:
        raise
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _DECLARED.append(library)
        return import_module("torchvision")


torchvision = _import_torchvision()
v2 = import_module("torchvision.transforms.v2")

__all__ = ["torchvision", "v2"]
