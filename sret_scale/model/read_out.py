"""Scores on the way through a deep pass: after chosen numbers of loops, and their mean over the last few loops."""

from collections import deque
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sret_scale.model.depth_plan import DepthPlan, StageDepth
from sret_scale.model.stack import StackModel


class ReadOut(NamedTuple):
    """Scores after `loops` loops of the last stage, those after each of the last few up to there, and their mean.

    steps: (B,) how far the last loop moved the tokens of each image, relative to their size; NaN after the first loop.
    """

    loops: int
    last: Tensor
    recent: tuple[Tensor, ...]
    steps: Tensor

    @property
    def mean(self) -> Tensor:
        return torch.stack(self.recent).mean(dim=0)


def read_outs(
    model: StackModel, images_BCHW: Tensor, counts: Collection[int], *, mean_of: int = 1
) -> Iterator[ReadOut]:
    """The read-outs of one pass through max(counts) loops of the last stage, as they come; nothing has a gradient.

    mean_of: over how many loops the mean goes. Where the size of branches depends on the number of loops, it is that of
    the whole pass. ValueError where the model has fewer loops: `with_loops` makes one of more.
    """
    depths = [StageDepth(tuple(range(stage.num_loops))) for stage in model.config.stages[:-1]]
    plan = DepthPlan((*depths, StageDepth(tuple(range(max(counts))))), tuple(range(1, max(counts))))
    recent: deque[Tensor] = deque(maxlen=mean_of)
    before_BDHW: Tensor | None = None
    with torch.no_grad():
        for loops, tokens_BDHW in enumerate(model.outputs_on_the_way(images_BCHW, plan), start=1):
            if any(count - mean_of < loops <= count for count in counts):
                recent.append(model.forward_head(tokens_BDHW))
            if loops in counts:
                size_B, step_B = tokens_BDHW.flatten(1).norm(dim=1), torch.full((len(tokens_BDHW),), torch.nan)
                if before_BDHW is not None:
                    step_B = (tokens_BDHW - before_BDHW).flatten(1).norm(dim=1) / size_B
                yield ReadOut(loops, recent[-1], tuple(recent), step_B)
            before_BDHW = tokens_BDHW
