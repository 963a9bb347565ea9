"""Sliced Recursive Transformers of 100 to 1000 and more block applications, on DeepSpeed.

The names below come from their modules when they are first asked for: `import sret_scale` imports no torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
_NAMES = {
    "data_pipelines.image.augment": ("AugmentConfig", "BatchAugment", "normalise"),
    "data_pipelines.image.normalise": ("Normaliser",),
    "data_pipelines.shards.index": ("open_shards",),
    "data_pipelines.stream.loader": ("DataConfig", "LoaderState", "TrainLoader"),
    "data_pipelines.stream.webdataset_door": ("to_webdataset",),
    "sret_scale.config.run_config": ("RunConfig",),
    "sret_scale.memory": ("MemoryConfig", "prepare_memory"),
    "sret_scale.memory.recursion": ("Recursion",),
    "sret_scale.model": ("SReT", "SReTConfig", "StageConfig", "preset"),
    "sret_scale.model.vision.weight_files": ("save_model",),
    "sret_scale.train.evaluate": ("evaluate",),
    "sret_scale.train.load_run": ("facts_of",),
    "sret_scale.lab.trained_model": ("load",),
}
__all__ = sorted(name for names in _NAMES.values() for name in names)


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _NAMES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
