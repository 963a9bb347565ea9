"""Translations: kept keys against whole passes, greedy and beam against exhaustive search, limits."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from sret_scale.model.text.decoding import _Search, as_translator, translations
from sret_scale.model.text.kept_keys import CachePolicy
from sret_scale.model.text.translator import Translator
from sret_scale.tasks.translation import packed
from tests.model.test_model_translator import built, config

SOURCES = [[3, 5, 7], [9, 2], [11], [4, 4, 4, 4, 1]]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"loop_order": "model", "num_loops": 3, "conditioning": "input_gated"},
    {"loop_order": "model_reversed", "num_loops": 3},
    {"num_loops": 4, "conditioning": "norm_per_loop", "norm_placement": "outer", "projections": "none"},
]


def whole_pass(model: Translator, source: list[int], target: list[int]) -> Tensor:
    """(V,) log-odds of the token behind a target, without kept keys."""
    features = model.forward_features(packed([(source, target)], model.config.context))
    return model.forward_head(features)[0, len(target)].log_softmax(dim=-1)


@pytest.mark.lengthy
@pytest.mark.parametrize("options", OPTIONS)
def test_greedy_with_kept_keys_is_greedy_by_whole_passes(options: dict[str, Any]) -> None:
    """In a batch of sentences of several lengths; odds of every place to 1e-10."""
    model = built(config(context=12, **options)).eval()
    found = translations(model, SOURCES)
    with torch.no_grad():
        for source, target in zip(SOURCES, found, strict=True):
            for place in range(len(target)):
                assert int(whole_pass(model, source, target[:place]).argmax()) == target[place]
            ended = int(whole_pass(model, source, target).argmax()) == 0
            assert ended or len(target) == 11
        search = _Search(model, SOURCES, 1)
        for _ in range(4):
            search.step()
        for sentence, source in enumerate(SOURCES):
            target, value = search._targets[sentence, 1:].tolist(), search._values[sentence, 0]
            if value > -torch.inf:
                steps = [whole_pass(model, source, target[:place])[target[place]] for place in range(len(target))]
                torch.testing.assert_close(value.double(), torch.stack(steps).sum(), rtol=0, atol=1e-5)


@pytest.mark.lengthy
def test_a_wide_beam_finds_what_all_translations_have_best() -> None:
    """Of 3 words and at most 4 tokens there are 85 + 256 translations, those of 4 tokens cut off."""
    model = built(config(context=5, vocabulary=4)).eval()
    for source in ([1, 2], [3], [2, 2, 1, 3]):
        best, values = [], []
        # Translations share their beginnings.
        passes: dict[tuple[int, ...], Any] = {}
        with torch.no_grad():
            for length in range(5):
                for words in itertools.product((1, 2, 3), repeat=length):
                    target = list(words)
                    for place in range(length + 1):
                        if words[:place] not in passes:
                            passes[words[:place]] = whole_pass(model, source, target[:place])
                    odds = [passes[words[:place]] for place in range(length + 1)]
                    value = sum(float(one[word]) for one, word in zip(odds, target, strict=False))
                    # At the limit the likeliest next token stands for the end.
                    value += float(odds[-1][0] if length < 4 else odds[-1].max())
                    best.append(target)
                    values.append(value / (length + 1))
        expected = best[max(range(len(best)), key=values.__getitem__)]
        [found] = translations(model, [source], beam=400)
        assert found == expected


@pytest.mark.parametrize("policy", ["last", "first"])
def test_named_policies_are_exact_for_blocks_used_once_alone(policy: CachePolicy) -> None:
    for loops in (1, 3):
        model = built(config(context=12, num_loops=loops)).eval()
        one, exact = (_Search(model, SOURCES, 2, cache) for cache in (policy, "each"))
        for _ in range(4):
            one.step()
            exact.step()
        assert torch.equal(one._values, exact._values) == (loops == 1)
        assert len(one._keys._kept) * loops == len(exact._keys._kept)
        if loops == 1:
            assert translations(model, SOURCES, cache=policy) == translations(model, SOURCES)


def test_a_sentence_does_not_depend_on_those_beside_it() -> None:
    model = built(config(context=12)).eval()
    for beam in (1, 3):
        assert translations(model, SOURCES, beam=beam) == [translations(model, [s], beam=beam)[0] for s in SOURCES]


def test_a_model_of_another_kind_is_refused() -> None:
    from sret_scale.model import preset

    with pytest.raises(ValueError, match="translate: expected a model of kind 'translation', got one of kind 'vision'"):
        as_translator(preset("sret_t").build(), "translate")
