"""What a language model is made of."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from sret_scale.model.config import StackConfig, require_positive

if TYPE_CHECKING:
    from sret_scale.model.text.next_byte import NextByte

NUM_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class TextConfig(StackConfig):
    """A decoder-only model over bytes. Its stages have one width: the first and last may be of blocks used once.

    context: bytes that it sees at a time.
    """

    kind: Literal["language"] = "language"
    context: int = 256
    is_causal: ClassVar[bool] = True
    num_classes: ClassVar[int] = 1
    """Of shards of text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("context", self.context)
        if len({stage.width for stage in self.stages}) > 1:
            raise ValueError(
                f"all stages of a language model have one width, got {[stage.width for stage in self.stages]}"
            )
        if self.padded:
            raise ValueError("padded is for models of images: choose a width of a multiple of 8 for each head")
        for index, stage in enumerate(self.stages):
            if stage.slices != "raster":
                raise ValueError(f"stage {index}: slices {stage.slices!r} is for images: use 'raster' and groups")
            wrong = [groups for groups in stage.groups[: stage.num_loops] if self.context % groups]
            if wrong and self.group_fit == "exact":
                raise ValueError(f"stage {index}: {wrong[0]} groups do not divide a context of {self.context} bytes")

    def num_tokens(self, index: int) -> int:
        """See `StackConfig.num_tokens`."""
        return self.context

    def example(self, micro_batch_size: int) -> Tensor:
        """(B, 1 + context) bytes."""
        return torch.zeros(micro_batch_size, 1 + self.context, dtype=torch.int64)

    @property
    def sample_size(self) -> dict[str, int]:
        """See `StackConfig.sample_size`."""
        return {"context": self.context}

    def build(self) -> "NextByte":
        """See `StackConfig.build`."""
        from sret_scale.model.text.next_byte import NextByte

        return NextByte(self)
