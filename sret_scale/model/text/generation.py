"""Text that a language model writes, byte by byte, with the keys and values of earlier bytes kept (`kept_keys`)."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from sret_scale.model.stack import StackModel
from sret_scale.model.text.kept_keys import CachePolicy, KeptKeys
from sret_scale.model.text.next_byte import NextByte


class Reader(Protocol):
    """Reads bytes of a row in pieces; `num_read` of them so far."""

    num_read: int

    def scores(self, piece: bytes) -> Tensor:
        """(V,) of the byte behind the piece, which goes on where the one before it ended."""


class WholePasses:
    """Reads the whole row again for every piece; a row's slices have their places in it, so it is filled up."""

    def __init__(self, model: NextByte) -> None:
        self._model, self._row, self.num_read = model, b"", 0

    def scores(self, piece: bytes) -> Tensor:
        self._row += piece
        self.num_read = len(self._row)
        inputs_1M = tokens_of(self._row.ljust(1 + self._model.config.context, b"\0"), self._model)
        features_1ND = self._model.forward_features(inputs_1M)
        return self._model.forward_head(features_1ND[:, self.num_read - 1])[0]


class LoopCache:
    """Reads every byte once. For models whose applications attend to all tokens: slices would need a table each."""

    def __init__(self, model: NextByte, policy: CachePolicy = "each") -> None:
        self._model, self._keys, self.num_read = model, KeptKeys(model.stages, policy), 0

    def scores(self, piece: bytes) -> Tensor:
        model, begin = self._model, self.num_read
        self.num_read += len(piece)
        x_1ND = model.stem(tokens_of(piece, model)) + model.position[begin : self.num_read]
        return model.forward_head(self._keys.read(x_1ND)[:, -1])[0]


def reader_of(model: NextByte, cache: CachePolicy = "each") -> Reader:
    """The fastest one that reads as the policy says. ValueError for another than "each" where a model keeps no keys."""
    is_sliced = any(groups > 1 for stage in model.config.stages for groups in stage.groups[: stage.num_loops])
    if is_sliced and cache != "each":
        raise ValueError(f"--cache {cache}: a model with slices reads whole rows and keeps no keys: leave --cache out")
    return WholePasses(model) if is_sliced else LoopCache(model, cache)


@torch.inference_mode()
def continuation(
    model: NextByte, prompt: bytes, *, temperature: float, seed: int, cache: CachePolicy = "each"
) -> Iterator[int]:
    """The bytes behind a prompt, without end: the likeliest at temperature 0, else drawn by seed.

    Where the context is full, reading begins again at half of it.
    """
    context, draws = model.config.context, torch.Generator().manual_seed(seed)
    text, reader = prompt[max(0, len(prompt) - context + 1) :], reader_of(model, cache)
    piece = b"\0" + text
    while True:
        if reader.num_read + len(piece) > context:
            text, reader = text[len(text) - context // 2 :], reader_of(model, cache)
            piece = b"\0" + text
        scores_V = reader.scores(piece).float().cpu()
        if temperature == 0:
            byte = int(scores_V.argmax())
        else:
            byte = int(torch.multinomial((scores_V / temperature).softmax(dim=0), 1, generator=draws))
        piece = bytes([byte])
        text += piece
        yield byte


def tokens_of(data: bytes, model: NextByte) -> Tensor:
    """(1, N) int64 on the model's device."""
    return torch.tensor([list(data)], device=model.position.device)


def as_next_byte(model: StackModel, asked: str) -> NextByte:
    """The model itself; ValueError, naming what was asked of it, where it is of another kind."""
    if not isinstance(model, NextByte):
        raise ValueError(f"{asked}: expected a model of kind 'language', got one of kind {model.config.kind!r}")
    return model
