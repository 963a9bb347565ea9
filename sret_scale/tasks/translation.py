"""Translation: pairs in, what each token of the targets costs out. R rows, N tokens of context, M = N + 1.

The pairs of a micro-batch are packed into rows (see `model.text.translator`), which changes nothing but the time: no
token sees another pair.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data_pipelines.remote.shard_sets import RemoteShardSet
from data_pipelines.shards.index import ShardSet
from data_pipelines.stream.loader import Batch
from data_pipelines.stream.reader import BadSampleError, ShardReader, sample_name
from data_pipelines.text.pieces import TARGET
from data_pipelines.text.tokens import Tokens, tokens_of
from sret_scale.config.run_config import RunConfig
from sret_scale.model import TranslationConfig
from sret_scale.model.text.decoding import translations
from sret_scale.model.text.kept_keys import CachePolicy
from sret_scale.model.text.translator import Translator
from sret_scale.tasks.task import Inputs

Pair = tuple[list[int], list[int]]
MAX_BEAM = 64


class Translation:
    """Implements `task.Task`. The scores are nats (R, N), the target is the weight (R, N) of each in the loss."""

    unit = "pairs"
    best = "saved"
    best_in_words = "bits saved"

    def __init__(self, config: RunConfig) -> None:
        self._model = check_translation(config)
        self._tokens = tokens_of(config.data.tokens)
        if self._tokens.num_tokens != self._model.vocabulary:
            raise ValueError(
                f"data.tokens={config.data.tokens or 'null, bytes'} has {self._tokens.num_tokens:,} tokens: set "
                f"model.vocabulary to that, got {self._model.vocabulary:,}"
            )

    def inputs(self, batch: Batch, *, seed: int, device: torch.device) -> Inputs:
        rows_R4M = self._rows(batch)
        # As many in every micro-batch of a run: another number in each would be another loss on other ranks.
        places = len(batch.indices) * self._model.context
        return Inputs(model_input=rows_R4M.to(device), target=(counted_tokens(rows_R4M).float() / places).to(device))

    def loss(self, scores: Tensor, inputs: Inputs, *, progress: float, loops: int, part: slice = slice(None)) -> Tensor:
        """The sum of nats over all tokens, an end for each target among them, over pairs times context."""
        weight = inputs.target[part]
        return (scores * weight).sum() * (len(inputs.target) / len(weight))

    def added_loss(self, *, progress: float) -> None:
        """None: nobody teaches."""

    def evaluation_input(self, batch: Batch, device: torch.device) -> Tensor:
        return self._rows(batch).to(device)

    def counts(self, scores: Tensor, batch: Batch) -> Tensor:
        """(R, 3): pairs of a row, their tokens, the nats of these."""
        rows_R4M = self._rows(batch).to(scores.device)
        counted_RN, pairs_R = counted_tokens(rows_R4M), rows_R4M[:, 3].amax(dim=1)
        nats_R = (scores.double() * counted_RN).sum(dim=1)
        return torch.stack([pairs_R.double(), counted_RN.sum(dim=1).double(), nats_R], dim=1)

    def numbers(self, counts: list[float]) -> dict[str, float]:
        """Nats of a token, and the share that is saved of what equal odds cost."""
        _, tokens, nats = counts
        return {"saved": 1 - nats / tokens / math.log(self._model.vocabulary), "loss": nats / tokens}

    def _rows(self, batch: Batch) -> Tensor:
        if batch.images.ndim != 3:
            raise ValueError("task=translation: expected shards of pairs, got others: `shards write tsv` makes them")
        pairs = []
        for row, view in zip(batch.images[batch.valid], batch.views[batch.valid].tolist(), strict=True):
            source, target = (side[:length] for side, length in zip(row.numpy(), view[1:4:2], strict=True))
            pairs.append((self._tokens.encode(source.tobytes()), self._tokens.encode(target.tobytes())))
        return packed(pairs, self._model.context)


def packed(pairs: list[Pair], context: int) -> Tensor:
    """(R, 4, 1 + context) rows of pairs, the longest ones first, each in the first row that has room for both sides.

    A target takes a place more, for the token 0 that it begins with. At least one row. ValueError for a longer pair.
    """
    rows: list[list[Pair]] = []
    room: list[tuple[int, int]] = []
    for source, target in sorted(pairs, key=lambda pair: -max(map(len, pair))):
        needed = len(source), 1 + len(target)
        if max(needed) > context:
            raise ValueError(
                f"a pair of {len(source)} and 1 + {len(target)} tokens does not fit into a context of {context}: set "
                f"model.context={-(-max(needed) // 8) * 8}, or write the shards with a smaller --window"
            )
        place = next((i for i, free in enumerate(room) if all(map(int.__le__, needed, free))), len(rows))
        if place == len(rows):
            rows.append([])
            room.append((context, context))
        rows[place].append((source, target))
        room[place] = room[place][0] - needed[0], room[place][1] - needed[1]
    found = torch.zeros(max(1, len(rows)), 4, 1 + context, dtype=torch.int64)
    for out_4M, row in zip(found, rows, strict=False):
        for side in (0, 1):
            texts = [[0, *pair[1]] if side else pair[0] for pair in row]
            tokens = [token for text in texts for token in text]
            numbers = [number for number, text in enumerate(texts, start=1) for _ in text]
            out_4M[2 * side : 2 * side + 2, : len(tokens)] = torch.tensor([tokens, numbers])
    return found


def check_fits(shards: ShardSet, tokens: Tokens, context: int) -> None:
    """ValueError where a pair has more tokens than a row has room for: else that is met in the middle of a run.

    Only what has as many bytes is read, and nothing of a set on a server. (Normalisation can make more tokens than
    bytes of a few signs.)
    """
    longest, where = 0, 0
    if isinstance(shards, RemoteShardSet):
        return
    with ShardReader(shards) as reader:
        for index in np.flatnonzero(np.maximum(shards.width, shards.height) + 2 > context).tolist():
            try:
                source, target = (tokens.encode(reader.read(index, member)) for member in ("", TARGET))
            except BadSampleError:
                # Whoever reads it tells.
                continue
            longest, where = max((longest, where), (max(len(source), 1 + len(target)), index))
    if longest > context:
        raise ValueError(
            f"{sample_name(shards, where)}: a pair of {longest} tokens does not fit into a context of {context}: write "
            f"the shards with a smaller --window, or train a model of model.context={-(-longest // 8) * 8}"
        )


def translated(
    model: Translator,
    tokens: Tokens,
    texts: Sequence[bytes],
    *,
    beam: int = 1,
    cache: CachePolicy = "each",
    first: int = 1,
) -> list[bytes]:
    """A line for each text, empty for an empty one. ValueError for a text that the model's context has no room for.

    first: what a message counts from.
    """
    found = [b""] * len(texts)
    every = ((place, tokens.encode(text)) for place, text in enumerate(texts) if text.decode().strip())
    # Spaces of no width are no tokens.
    encoded = {place: source for place, source in every if source}
    for place, source in encoded.items():
        if len(source) > model.config.context:
            raise ValueError(
                f"text {first + place}, {texts[place].decode()[:40]!r}...: {len(source):,} tokens, expected at most "
                f"{model.config.context}: cut it into sentences"
            )
    # Those of like length together, as many at a time as make a batch of some size with any beam.
    ordered, size = sorted(encoded, key=lambda place: len(encoded[place])), max(1, MAX_BEAM // beam)
    for start in range(0, len(ordered), size):
        places = ordered[start : start + size]
        targets = translations(model, [encoded[place] for place in places], beam=beam, cache=cache)
        for place, target in zip(places, targets, strict=True):
            found[place] = b" ".join(tokens.decode(target).splitlines())
    return found


def counted_tokens(rows_R4M: Tensor) -> Tensor:
    """(R, N) whether the token that follows each place of the targets counts: all of a pair, and the 0 behind them."""
    return rows_R4M[:, 3, :-1] > 0


def check_beam(beam: int) -> None:
    """ValueError for a number of beginnings that is none."""
    if not 1 <= beam <= MAX_BEAM:
        raise ValueError(f"--beam: expected 1 to {MAX_BEAM}, got {beam}")


def check_translation(config: RunConfig) -> TranslationConfig:
    """The model; ValueError unless it is one of translation, and nobody teaches it."""
    if not isinstance(config.model, TranslationConfig):
        raise ValueError(f"task=translation: expected a model of kind 'translation', got {config.model.kind!r}")
    if config.distill.teacher is not None:
        raise ValueError(f"task=translation has no teacher: set distill.teacher=null, got {config.distill.teacher}")
    return config.model
