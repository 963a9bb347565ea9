"""Sizes in which a model's tensors are stored: the published ones, or multiples of 8 for a GPU's matrix units.

A padded model has zeros in the channels that are too many, and they stay zero under training: norms keep their
published size and look at the real channels alone, so no gradient reaches the others (`padding` gives the argument).
"""

from dataclasses import dataclass

from sret_scale.model.config import StackConfig

ALIGNMENT = 8


@dataclass(frozen=True)
class Sizes:
    """Channels of one stage as stored. head_width is the real one: attention divides by its root."""

    width: int
    head_width: int
    stored_head_width: int
    hidden_width: int
    projection_hidden_width: int


def aligned(size: int) -> int:
    """The next multiple of 8."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def stored_sizes(config: StackConfig, index: int) -> Sizes:
    """Those of stage `index`."""
    stage = config.stages[index]
    first = config.stages[0].width
    store = aligned if config.padded else int
    return Sizes(
        # Each channel of a stage becomes several of the next (depthwise pooling), so padding grows by the same factor.
        width=store(first) * (stage.width // first),
        head_width=stage.width // stage.num_heads,
        stored_head_width=store(stage.width // stage.num_heads),
        hidden_width=store(stage.hidden_width),
        projection_hidden_width=store(stage.projection_hidden_width),
    )


def stem_widths(config: StackConfig) -> tuple[int, int, int]:
    """Stored output channels of the three convolutions."""
    width = stored_sizes(config, 0).width
    half = config.stages[0].width // 2
    return (aligned(half) if config.padded else half, width, width)
