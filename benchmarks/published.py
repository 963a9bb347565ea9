"""The published SReT itself, from a checkout that `SRET_PUBLISHED` names: as it is, but for where it looks for timm.

The code (Shen et al., github.com/szq0214/SReT) is not part of this repository.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from sret_scale.model import SReT
from sret_scale.model.vision.official import to_published
from sret_scale.timm.door import import_timm

# Of our presets; theirs are functions of these names.
NAMES = {"sret_t": "SReT_T", "sret_lt": "SReT_LT", "sret_s": "SReT_S"}


def published_twin(preset: str, model: SReT) -> nn.Module | None:
    """The published model with the weights of ours; None where no checkout is named, or it lacks this preset.

    FileNotFoundError where the checkout has no SReT.py.
    """
    folder = os.environ.get("SRET_PUBLISHED")
    if not folder or preset not in NAMES:
        return None
    file = Path(folder) / "SReT.py"
    if not file.is_file():
        raise FileNotFoundError(f"SRET_PUBLISHED={folder}: expected a checkout of SReT with the file SReT.py in it")
    timm = import_timm()
    # It was written for timm 0.3, which kept these there.
    sys.modules["timm.models.layers"] = timm.layers
    sys.modules["timm.models.registry"] = timm.models
    spec = importlib.util.spec_from_file_location("published_sret", file)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules["published_sret"] = module
    spec.loader.exec_module(module)
    theirs: nn.Module = getattr(module, NAMES[preset])(num_classes=model.config.num_classes)
    theirs.load_state_dict(to_published(model.config, model.state_dict()))
    return theirs
