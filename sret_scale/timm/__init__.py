"""At home in timm: importing this registers every preset, so that `timm.create_model("sret_t")` works, and `recursive`.

timm is an optional extra (`./launch.sh setup timm`) and importing it takes seconds: import this where it is used.
"""

from sret_scale.timm.door import create_architecture, create_model, import_timm, preprocessing
from sret_scale.timm.recursive import make_recursive, register_recursive, set_loops
from sret_scale.timm.sret_model import TimmSReT, register_presets

register_presets()
register_recursive()

__all__ = [
    "TimmSReT",
    "create_architecture",
    "create_model",
    "import_timm",
    "make_recursive",
    "preprocessing",
    "register_presets",
    "set_loops",
]
