"""Language: a window of bytes in, what each next byte costs out. B windows, N bytes of context.

A row is the byte 0, which stands for the beginning, and the window. What a window repeats of the one before it is its
context and costs nothing; bytes of the window before count there. So every byte of every document counts once.
"""

import math

import torch
from torch import Tensor

from data_pipelines.stream.loader import Batch
from sret_scale.config.run_config import RunConfig
from sret_scale.model import TextConfig
from sret_scale.model.upload import uploaded
from sret_scale.tasks.task import Inputs


class Language:
    """Implements `task.Task`. The scores are nats (B, N), the target is 1 (B, N) for each byte that counts, else 0."""

    unit = "windows"
    best = "saved"
    best_in_words = "bits saved"

    def __init__(self, config: RunConfig) -> None:
        check_language(config)

    def inputs(self, batch: Batch, *, seed: int, device: torch.device) -> Inputs:
        return Inputs(model_input=self.evaluation_input(batch, device), target=counted_bytes(batch).to(device))

    def loss(self, scores: Tensor, inputs: Inputs, *, progress: float, loops: int, part: slice = slice(None)) -> Tensor:
        """Nats a byte of full windows: the sum over what counts, over all places that there are.

        A count of its own for each micro-batch would give short windows more weight, and another loss on more ranks.
        """
        return (scores * inputs.target[part]).mean()

    def added_loss(self, *, progress: float) -> None:
        """None: nobody teaches."""

    def evaluation_input(self, batch: Batch, device: torch.device) -> Tensor:
        rows_BM = torch.nn.functional.pad(batch.images, (1, 0))
        return uploaded(rows_BM, device).long()

    def counts(self, scores: Tensor, batch: Batch) -> Tensor:
        """(B, 3): 1, bytes that count, their nats."""
        counted_BN, valid_B = counted_bytes(batch).to(scores.device), uploaded(batch.valid, scores.device)
        nats_B = (scores.double() * counted_BN).sum(dim=1)
        return torch.stack([valid_B.double(), counted_BN.sum(dim=1).double(), nats_B], dim=1)

    def numbers(self, counts: list[float]) -> dict[str, float]:
        """Bits that a byte costs, the share of its eight that is saved, and the same cost in nats."""
        _, num_bytes, nats = counts
        bits = nats / num_bytes / math.log(2)
        return {"bits_per_byte": bits, "saved": 1 - bits / 8, "loss": nats / num_bytes}


def counted_bytes(batch: Batch) -> Tensor:
    """(B, N) fp32: 1 for each byte that counts; none in rows that only fill up."""
    start_B, counted_B = batch.views[:, 1], batch.views[:, 3]
    place_N = torch.arange(batch.images.shape[1])
    return ((place_N >= start_B[:, None]) & (place_N < (start_B + counted_B)[:, None])).float()


def check_language(config: RunConfig) -> None:
    """ValueError unless the model is one of language, and nobody teaches it."""
    if not isinstance(config.model, TextConfig) or config.model.kind != "language":
        raise ValueError(f"task=language: expected a model of kind 'language', got {config.model.kind!r}")
    if config.distill.teacher is not None:
        raise ValueError(f"task=language has no teacher: set distill.teacher=null, got {config.distill.teacher}")
