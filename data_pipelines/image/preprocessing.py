"""How an image becomes what a trained model takes: the settings of evaluation that go wherever the weights go."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from data_pipelines.config import DataConfig
from data_pipelines.image.decode import decode_rgb
from data_pipelines.image.view import centre_pixels

_Side = Annotated[int, Field(ge=1, le=1 << 14)]
_Mean = Annotated[float, Field(allow_inf_nan=False)]
_Deviation = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """RGB; the short side resized to `resize` pixels (antialiased); the centre of `crop` x `crop` pixels; then
    (pixel / 255 - mean) / std per channel."""

    resize: _Side
    crop: _Side
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[_Mean, _Mean, _Mean]
    std: tuple[_Deviation, _Deviation, _Deviation]

    def __post_init__(self) -> None:
        if self.crop > self.resize:
            raise ValueError(f"expected a crop within the side of {self.resize} pixels, got {self.crop}")

    def pixels(self, data: bytes) -> Tensor:
        """uint8 (3, crop, crop) of an image file's bytes, as evaluation sees it. Raises BadImageError."""
        config = DataConfig(eval_crop_rate=self.crop / self.resize, interpolation=self.interpolation)
        return centre_pixels(decode_rgb(data), config, self.crop)
