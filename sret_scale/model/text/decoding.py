"""Translations of sources: greedy, or by a search that keeps the likeliest beginnings (a beam).

B sentences, W beginnings of each, R = B * W rows, S and D as in `translator`, V tokens.
"""

from collections.abc import Sequence
from typing import cast

import torch

from sret_scale.model.cross_attention import Sight
from sret_scale.model.stack import StackModel
from sret_scale.model.stage import Stage
from sret_scale.model.text.kept_keys import CachePolicy, KeptKeys
from sret_scale.model.text.translator import Translator


@torch.inference_mode()
def translations(
    model: Translator, sources: Sequence[list[int]], *, beam: int = 1, cache: CachePolicy = "each"
) -> list[list[int]]:
    """The tokens of a translation of each source; no source is empty or longer than the context.

    beam: beginnings that are kept; one that ends keeps its place, so 1 takes the likeliest token again and again. Of
        those that ended the one of the largest log-probability over its length is taken, its end counted.
    A translation ends at the context, and at twice the length of its source and 16 tokens more.
    """
    search = _Search(model, sources, beam, cache)
    while search.step():
        pass
    return [max(found, key=lambda one: one[0])[1] for found in search.finished]


def as_translator(model: StackModel, asked: str) -> Translator:
    """The model itself; ValueError, naming what was asked of it, where it is of another kind."""
    if not isinstance(model, Translator):
        raise ValueError(f"{asked}: expected a model of kind 'translation', got one of kind {model.config.kind!r}")
    return model


class _Search:
    """The beams of a batch of sentences. `finished`: value and tokens of what ended, for each sentence."""

    def __init__(self, model: Translator, sources: Sequence[list[int]], beam: int, cache: CachePolicy = "each") -> None:
        self._model, self._beam = model, beam
        self._keys = KeptKeys(model.stages[model.config.encoder_stages :], cache)
        self._sights = _sights(model, sources, beam)
        self.finished: list[list[tuple[float, list[int]]]] = [[] for _ in sources]
        self._limits = [min(model.config.context - 1, 2 * len(source) + 16) for source in sources]
        device = model.stem.weight.device
        self._targets = torch.zeros(len(sources) * beam, 1, dtype=torch.int64, device=device)
        # All beginnings are the same at first: but one of each sentence is out.
        self._values = torch.full((len(sources), beam), -torch.inf, device=device)
        self._values[:, 0] = 0.0

    def step(self) -> bool:
        """Lets every beginning grow by a token; False when all have ended."""
        model, beam, device = self._model, self._beam, self._targets.device
        place = torch.tensor(self._keys.num_read, device=device)
        x_R1D = model.embedded(1, self._targets[:, -1:], place)
        odds_RV = model.forward_head(self._keys.read(x_R1D, self._sights)[:, -1]).float().log_softmax(dim=-1)
        vocabulary = odds_RV.shape[1]
        values_BX = (self._values.flatten()[:, None] + odds_RV).view(len(self.finished), -1)
        best = (part.tolist() for part in values_BX.topk(min(beam, values_BX.shape[1]), dim=1))
        picked: list[tuple[int, int, float]] = []
        for sentence, (values, places) in enumerate(zip(*best, strict=True)):
            live = []
            free = beam - len(self.finished[sentence])
            for value, found in zip(values[:free], places, strict=False):
                row, token = sentence * beam + found // vocabulary, found % vocabulary
                if value > -torch.inf and (token == 0 or self._keys.num_read > self._limits[sentence]):
                    tokens_of_row = self._targets[row, 1:].tolist()
                    self.finished[sentence].append((value / (1 + len(tokens_of_row)), tokens_of_row))
                elif value > -torch.inf:
                    live.append((row, token, value))
            picked += (live + [(sentence * beam, 0, -torch.inf)] * beam)[:beam]
        rows, tokens, kept = zip(*picked, strict=True)
        chosen_R = torch.tensor(rows, device=device)
        self._keys.select(chosen_R)
        self._targets = torch.cat([self._targets[chosen_R], chosen_R.new_tensor(tokens)[:, None]], dim=1)
        self._values = self._values.new_tensor(kept).view(-1, beam)
        return bool((self._values > -torch.inf).any())


def _sights(model: Translator, sources: Sequence[list[int]], beam: int) -> list[Sight]:
    """What the decoder's stages see of the sources, each repeated for its beam: keys and values, made once."""
    device, longest = model.stem.weight.device, max(map(len, sources))
    source_BS = torch.zeros(len(sources), longest, dtype=torch.int64, device=device)
    for row, source in zip(source_BS, sources, strict=True):
        row[: len(source)] = torch.tensor(source, device=device)
    length_B = torch.tensor([len(source) for source in sources], device=device)
    places_S = torch.arange(longest, device=device)
    is_there_B11S = (places_S < length_B[:, None])[:, None, None]
    # Padding sees all that is there, and nobody sees it.
    memory_BSD = model.memory(model.embedded(0, source_BS, places_S), Sight(mask=is_there_B11S), None, None)
    found = []
    for stage in model.stages[model.config.encoder_stages :]:
        parts = cast(Stage, stage).keys_and_values(memory_BSD)
        memory = tuple(part.repeat_interleave(beam, dim=0) for part in parts)
        found.append(Sight(memory=memory, memory_mask=is_there_B11S.repeat_interleave(beam, dim=0)))
    return found
