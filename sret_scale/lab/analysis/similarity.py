"""How alike the streams after different loops are: linear CKA (Kornblith et al., arXiv 1905.00414, equation 3).

Of each image the stream is averaged over its tokens, which their order does not change; so stages and loops of any
width can be compared on the same images.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sret_scale.lab.analysis.subject import Subject
from sret_scale.lab.readable_numbers import evenly
from sret_scale.model.stage import Application, Chain, chains_run_by
from sret_scale.runs.metrics_log import Floats

Use = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """`cka[i, j]` in [0, 1] between the streams after two uses of blocks; `uses` are (stage, block, loop)."""

    name: str
    uses: tuple[Use, ...]
    cka: Floats


def linear_cka(x_BD: Tensor, y_BD: Tensor) -> float:
    """Linear CKA of two sets of features of the same B samples; NaN where one of them is constant.

    |Yc' Xc|^2 / (|Xc' Xc| |Yc' Yc|) in Frobenius norms of the centred features.
    """
    x_BD, y_BD = (part.double() - part.double().mean(dim=0) for part in (x_BD, y_BD))
    cross = torch.linalg.matrix_norm(y_BD.T @ x_BD) ** 2
    own = torch.linalg.matrix_norm(x_BD.T @ x_BD) * torch.linalg.matrix_norm(y_BD.T @ y_BD)
    return float(cross / own) if own > 0 else float("nan")


def similarity(subject: Subject, *, most_uses: int) -> Similarity:
    """CKA between up to `most_uses` uses of each stage's blocks, spread evenly, over the subject's images."""
    if most_uses < 2:
        raise ValueError(f"--uses: expected at least 2, got {most_uses}")
    kept = {
        index: set(evenly(stage.num_applications, most_uses)) for index, stage in enumerate(subject.model.config.stages)
    }
    features: dict[Use, list[Tensor]] = {}
    with torch.inference_mode(), recorded(subject, features, kept):
        for images_BCHW, _ in subject.batches:
            subject.model(images_BCHW)
    streams = {use: torch.cat(parts) for use, parts in features.items()}
    uses = tuple(streams)
    cka = np.array([[linear_cka(streams[a], streams[b]) for b in uses] for a in uses])
    return Similarity(name=subject.name, uses=uses, cka=cka)


def recorded(
    subject: Subject, features: dict[Use, list[Tensor]], kept: dict[int, set[int]]
) -> contextlib.AbstractContextManager[None]:
    """Inside the `with` the model's stages note the token mean of the stream after each use that is kept."""

    def recorder(index: int) -> Chain:
        def run_chain(applications: Sequence[Application], x_BND: Tensor) -> Tensor:
            for place, application in enumerate(applications):
                x_BND = application(x_BND)
                if place in kept[index]:
                    stream_BND = x_BND.chunk(2, dim=1)[0] if application.injected else x_BND
                    use = (index, application.slot.block, application.slot.loop)
                    features.setdefault(use, []).append(stream_BND.float().mean(dim=1))
            return x_BND

        return run_chain

    return chains_run_by(subject.model.stages, recorder)
