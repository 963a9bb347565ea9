"""Sliced Recursive Transformers of 100 to 1000 and more block applications, on DeepSpeed.

The names below come from their modules when they are first asked for: `import sret_scale` imports no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sret_scale.lab.trained_model import load

__version__ = "0.1.0"
__all__ = ["load"]

_HOMES = {"load": "sret_scale.lab.trained_model"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
