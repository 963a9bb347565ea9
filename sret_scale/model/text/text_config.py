"""What models of text are made of."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from sret_scale.model.config import StackConfig, require_positive, require_whole

if TYPE_CHECKING:
    from sret_scale.model.text.token_model import TokenModel
    from sret_scale.model.text.translator import Translator

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
    vocabulary: ClassVar[int] = NUM_BYTES
    """Different tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("context", self.context)
        if len({stage.width for stage in self.stages}) > 1:
            raise ValueError(
                f"all stages of a model of text have one width, got {[stage.width for stage in self.stages]}"
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

    def build(self) -> "TokenModel":
        """See `StackConfig.build`."""
        from sret_scale.model.text.next_byte import NextByte

        return NextByte(self)


@dataclass(frozen=True, kw_only=True)
class TranslationConfig(TextConfig):
    """An encoder and a decoder over tokens, which share their embedding.

    context: tokens of a row, of either side.
    vocabulary: how many different tokens there are; token 0 begins and ends a sentence.
    encoder_stages: how many of the stages encode.
    """

    kind: Literal["translation"] = "translation"  # type: ignore[assignment]
    vocabulary: int = NUM_BYTES  # type: ignore[misc]
    encoder_stages: int = 1
    is_causal: ClassVar[bool] = False
    """Sentences share rows, so masks say what a token sees."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("vocabulary", self.vocabulary)
        require_whole("encoder_stages", self.encoder_stages)
        if not 1 <= self.encoder_stages < len(self.stages):
            raise ValueError(
                f"encoder_stages: expected 1 to {len(self.stages) - 1} of {len(self.stages)} stages, and at least one "
                f"behind them to decode, got {self.encoder_stages}"
            )
        for index, stage in enumerate(self.stages):
            if any(groups > 1 for groups in stage.groups):
                raise ValueError(f"stage {index}: sentences share rows and are not sliced: set groups=[1]")
            if stage.norm_placement not in ("pre", "outer"):
                raise ValueError(
                    f"stage {index}: norm_placement {stage.norm_placement!r} has no constants for three sub-layers: "
                    "use 'pre' or 'outer'"
                )

    def has_memory(self, index: int) -> bool:
        """See `StackConfig.has_memory`."""
        return index >= self.encoder_stages

    def example(self, micro_batch_size: int) -> Tensor:
        """(R, 4, 1 + context): rows of pairs that fill them (see `translator`)."""
        row_4M = torch.tensor([0, 1, 0, 1])[:, None].repeat(1, 1 + self.context)
        return row_4M.repeat(micro_batch_size, 1, 1)

    def build(self) -> "Translator":
        """See `StackConfig.build`."""
        from sret_scale.model.text.translator import Translator

        return Translator(self)
