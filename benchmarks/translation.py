"""A translator's step and its decoding, beside torch.nn's layers: `python -m benchmarks.translation`.

The twin has the same sizes, weights tied alike, embedding, norms and loss, of `torch.nn.TransformerEncoderLayer` and
`TransformerDecoderLayer`; no projections on either side, which torch has not. Batches are of the shipped pairs, as
many as the recipe's micro-batch has, drawn by a seed. The twin reads them in two ways: padded to their longest, as
torch's own examples do, and packed into our rows with our masks, so that the layers alone differ. All take turns;
medians of processor time of one core.
"""

import argparse
import json
import lzma
import platform
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.model import CLOCKS, median_times_s
from data_pipelines.text.tokens import Pieces, train_pieces
from sret_scale.config.recipes import recipe
from sret_scale.model import TranslationConfig
from sret_scale.model.text.decoding import translations
from sret_scale.model.text.translator import Translator, place_in_pair
from sret_scale.tasks.translation import Pair, counted_tokens, packed

VOCABULARY, NUM_TOKENS = 4000, 64


class TorchTranslator(nn.Module):
    """`Translator` without projections and branch scales, of torch's layers."""

    def __init__(self, config: TranslationConfig) -> None:
        super().__init__()
        stage = config.stages[0]
        sizes = stage.width, stage.num_heads, stage.hidden_width
        options: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.num_heads, self.num_loops = stage.num_heads, stage.num_loops
        self.embedding = nn.Embedding(config.vocabulary, stage.width)
        self.position = nn.Parameter(0.02 * torch.randn(2, config.context, stage.width))
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(*sizes, **options) for _ in range(stage.num_blocks))
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(*sizes, **options) for _ in range(stage.num_blocks))
        self.memory_norm, self.norm = nn.LayerNorm(stage.width), nn.LayerNorm(stage.width)

    def embedded(self, tokens: Tensor) -> Tensor:
        """Scaled as a translator's."""
        return self.embedding(tokens) * self.embedding.embedding_dim**0.5

    def loss(self, source_RS: Tensor, target_RM: Tensor, is_counted_RN: Tensor, options: dict[str, Any]) -> Tensor:
        """The mean of nats; options: places and masks of the rows."""
        memory = self.embedded(source_RS) + self.position[0][options["source_places"]]
        for block in self.encoder:
            for _ in range(self.num_loops):
                memory = block(memory, **options["encoder"])
        memory = self.memory_norm(memory)
        x_RND = self.embedded(target_RM[:, :-1]) + self.position[1][options["target_places"]]
        for block in self.decoder:
            for _ in range(self.num_loops):
                x_RND = block(x_RND, memory, **options["decoder"])
        scores_TV = F.linear(self.norm(x_RND[is_counted_RN]), self.embedding.weight)
        return F.cross_entropy(scores_TV, target_RM[:, 1:][is_counted_RN])

    def padded(self, pairs: list[Pair]) -> Tensor:
        """The loss of pairs that are filled up to the longest."""
        source_RS = nn.utils.rnn.pad_sequence([torch.tensor(source) for source, _ in pairs], batch_first=True)
        rows = [torch.tensor([0, *target, 0]) for _, target in pairs]
        target_RM = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([[len(source), 1 + len(target)] for source, target in pairs])
        source_places, target_places = torch.arange(source_RS.shape[1]), torch.arange(target_RM.shape[1] - 1)
        hidden_RS, is_counted_RN = source_places >= lengths[:, :1], target_places < lengths[:, 1:]
        causal = torch.ones(len(target_places), len(target_places), dtype=torch.bool).triu(1)
        options = {
            "source_places": source_places,
            "target_places": target_places,
            "encoder": {"src_key_padding_mask": hidden_RS},
            "decoder": {"tgt_mask": causal, "memory_key_padding_mask": hidden_RS},
        }
        return self.loss(source_RS, target_RM, is_counted_RN, options)

    def packed(self, rows_R4M: Tensor) -> Tensor:
        """The loss of rows as `packed` makes them, with our masks turned round."""
        source_RS, source_pair_RS, _, target_pair_RN = rows_R4M[..., :-1].unbind(1)
        earlier = torch.ones(rows_R4M.shape[2] - 1, rows_R4M.shape[2] - 1, dtype=torch.bool).tril()
        is_same = target_pair_RN[:, :, None] == target_pair_RN[:, None]
        is_sources = (target_pair_RN[:, :, None] == source_pair_RS[:, None]) | (target_pair_RN[:, :, None] == 0)
        masks = [source_pair_RS[:, :, None] == source_pair_RS[:, None], is_same & earlier, is_sources]
        hidden = [~mask.repeat_interleave(self.num_heads, dim=0) for mask in masks]
        options = {
            "source_places": place_in_pair(source_pair_RS),
            "target_places": place_in_pair(target_pair_RN),
            "encoder": {"src_mask": hidden[0]},
            "decoder": {"tgt_mask": hidden[1], "memory_mask": hidden[2]},
        }
        return self.loss(source_RS, rows_R4M[:, 2], counted_tokens(rows_R4M), options)


def shipped_pairs() -> list[Pair]:
    """The pairs that the project ships for training, in pieces that are trained on them."""
    sample = Path(str(files("data_pipelines") / "sample" / "libreoffice_help" / "train.tsv.xz"))
    texts = [line.split("\t") for line in lzma.decompress(sample.read_bytes()).decode().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tokens.model"
        model.write_bytes(train_pieces([side for pair in texts for side in pair], VOCABULARY))
        tokens = Pieces(model)
    return [(tokens.encode(source.encode()), tokens.encode(target.encode())) for source, target in texts]


def whole_beginnings(model: Translator, sources: list[list[int]], num_tokens: int) -> None:
    """So many tokens of greedy translations without kept keys: whole passes, each over all that there is."""
    targets: list[list[int]] = [[] for _ in sources]
    for _ in range(num_tokens):
        pairs = zip(sources, targets, strict=True)
        rows = torch.cat([packed([pair], model.config.context) for pair in pairs])
        longest = 1 + max(len(source) for source in sources) + num_tokens
        scores_RNV = model.forward_head(model.forward_features(rows[..., :longest]))
        for row, target in enumerate(targets):
            target.append(max(1, int(scores_RNV[row, len(target)].argmax())))


def decoding_times_s(model: Translator, pairs: list[Pair]) -> dict[str, float]:
    """Of 16 sentences at once, which end after 64 tokens, twice the source and 16 more. ValueError where none does."""
    sources = [source[:24] for source, _ in pairs if len(source) >= 24][:16]
    longest = max(map(len, translations(model, sources)))
    if longest < NUM_TOKENS:
        raise ValueError(f"chance ended all translations after {longest} of {NUM_TOKENS} tokens: take another seed")
    decoding = {
        "kept keys": lambda: translations(model, sources),
        "whole passes": lambda: whole_beginnings(model, sources, longest),
    }
    return median_times_s(decoding, 1, CLOCKS["processor"])


def main() -> None:
    """Measure, print and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "translation.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = recipe("nmt_tiny").config
    assert isinstance(config.model, TranslationConfig)
    pairs, size = shipped_pairs(), config.train.micro_batch_size
    random.Random(0).shuffle(pairs)
    batches = [pairs[start : start + size] for start in range(0, 16 * size, size)]
    stages = tuple(replace(stage, projections="none") for stage in config.model.stages)
    without = replace(config.model, stages=stages, vocabulary=VOCABULARY)
    model, twin = without.build().train(), TorchTranslator(without).train()

    def ours(batch: list[Pair]) -> Tensor:
        rows = packed(batch, without.context)
        is_counted = counted_tokens(rows)
        return (model(rows) * is_counted).sum() / is_counted.sum()

    losses: dict[str, Callable[[list[Pair]], Tensor]] = {
        "ours": ours,
        "torch, padded": twin.padded,
        "torch, our rows": lambda batch: twin.packed(packed(batch, without.context)),
    }

    def steps(loss: Callable[[list[Pair]], Tensor]) -> None:
        for batch in batches:
            loss(batch).backward()

    calls = {name: partial(steps, loss) for name, loss in losses.items()}
    step_s = median_times_s(calls, arguments.repeats, CLOCKS["processor"])
    decoding_s = decoding_times_s(model.eval(), pairs)
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    record = {
        "command": "python -m benchmarks.translation",
        "machine": {
            "processor": cpu.partition(": ")[2],
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": 1,
            "clock": "processor",
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "pairs": size * len(batches),
        "seconds": step_s,
        "times_as_fast": {name: step_s[name] / step_s["ours"] for name in list(calls)[1:]},
        "decoding_seconds": decoding_s,
        "decoding_times_as_fast": decoding_s["whole passes"] / decoding_s["kept keys"],
    }
    text = json.dumps(record, indent=2) + "\n"
    arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
