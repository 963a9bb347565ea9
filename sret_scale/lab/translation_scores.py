"""How good the translations of a run are, by sacrebleu alone, beside those that need no model."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipelines.extras import install_extra
from data_pipelines.stream.reader import ShardReader
from data_pipelines.text.pieces import TARGET
from data_pipelines.text.tokens import tokens_of
from sret_scale.model.text.decoding import as_translator
from sret_scale.model.text.kept_keys import CachePolicy
from sret_scale.tasks.translation import translated
from sret_scale.train.evaluate_main import load_model_of, open_shards


def translation_scores(
    run: Path, shards: str | None, weights: Any, loops: int | None, beam: int, cache: CachePolicy
) -> dict[str, Any]:
    """BLEU and chrF of a run's translations of `shards` (None: its test set) and of the sources as they are.

    ValueError where sacrebleu is missing, and for a run or shards of another kind.
    """
    metrics = bleu_and_chrf()
    opened, config = open_shards(run, shards)
    model = as_translator(load_model_of(run, weights, loops)[0], "--beam")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    with ShardReader(opened) as reader:
        pairs = [(reader.read(index), reader.read(index, TARGET)) for index in range(opened.num_samples)]
    sources = [source for source, _ in pairs]
    started = time.monotonic()
    found = translated(model, tokens_of(config.data.tokens), sources, beam=beam, cache=cache)
    result = {"beam": beam, "cache": cache, "sentences_per_s": len(found) / (time.monotonic() - started)}
    return result | scores_of(metrics, found, sources, [target.decode() for _, target in pairs])


def bleu_and_chrf() -> dict[str, Any]:
    """sacrebleu's metrics by name; ValueError where it is missing, to be told before anything is translated."""
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ValueError(f"BLEU and chrF need sacrebleu: {install_extra('text')}") from error
    return {"bleu": BLEU(), "chrf": CHRF()}


def scores_of(
    metrics: Mapping[str, Any], found: Sequence[bytes], sources: Sequence[bytes], references: Sequence[str]
) -> dict[str, Any]:
    """Scores and signatures of translations by `bleu_and_chrf`, and the scores of the sources as they are."""
    result: dict[str, Any] = {}
    for name, metric in metrics.items():
        for whose, texts in (("", found), ("_of_copy", sources)):
            decoded = [text.decode(errors="replace") for text in texts]
            result[name + whose] = metric.corpus_score(decoded, [references]).score
        result[f"{name}_signature"] = str(metric.get_signature())
    return result
