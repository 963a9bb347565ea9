"""The model: SReT of any depth, its presets and its counts. Imports torch and einops only."""

from sret_scale.model.config import SReTConfig, StackConfig, StageConfig
from sret_scale.model.count import describe
from sret_scale.model.noise import Noise
from sret_scale.model.stack import ParameterTag, StackModel
from sret_scale.model.stage import Application, Stage
from sret_scale.model.text.text_config import TextConfig, TranslationConfig
from sret_scale.model.vision.presets import PRESETS, preset
from sret_scale.model.vision.sret import SReT
from sret_scale.model.vision.stem import Stem

__all__ = [
    "PRESETS",
    "Application",
    "Noise",
    "ParameterTag",
    "SReT",
    "SReTConfig",
    "StackConfig",
    "StackModel",
    "Stage",
    "StageConfig",
    "Stem",
    "TextConfig",
    "TranslationConfig",
    "describe",
    "preset",
]
