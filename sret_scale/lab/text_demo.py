"""The demo of text: a translator learns from help pages that ship with the project, and one of 108 applications trains.

pairs -> shards, subwords -> translator -> ten sentences, and BLEU beside a copy -> 108 applications, alarms -> page
"""

import lzma
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from data_pipelines.atomic_files import write_whole
from data_pipelines.text.pieces import TextWindows
from data_pipelines.text.tokens import tokens_of
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.config.recipes import recipe
from sret_scale.config.run_config import RunConfig
from sret_scale.lab.report.health import alarms
from sret_scale.lab.report.page import write_report
from sret_scale.lab.report.run_record import load_run
from sret_scale.lab.translation_scores import bleu_and_chrf, scores_of
from sret_scale.launch.nodes import choose_nodes
from sret_scale.launch.preflight import start_run
from sret_scale.model import TranslationConfig
from sret_scale.model.text.decoding import as_translator
from sret_scale.tasks.translation import translated
from sret_scale.train.evaluate_main import load_model_of
from sret_scale.train.load_run import load_config

SAMPLE = Path(str(files("data_pipelines") / "sample" / "libreoffice_help"))
VOCABULARY = 4000
WINDOW = 800
"""Bytes of a side at most: the pairs have up to 400 characters."""
DEEP_LOOPS = 27
"""Of two blocks on either side: 108 applications."""
NUM_SCORED, NUM_SHOWN, MOST_SHOWN_CHARACTERS = 200, 10, 80
COLUMNS = ("source", "translation", "reference")


def text_config(output: Path, num_ranks: int) -> RunConfig:
    """The recipe `nmt_tiny`, for minutes in place of an hour."""
    config, shards = recipe("nmt_tiny").config, output / "shards"
    data = replace(
        config.data,
        train_folder=str(shards / "train"),
        test_folder=str(shards / "dev"),
        tokens=str(shards / "train" / "tokens.model"),
    )
    optim = replace(config.optim, warmup_images=2_000)
    train = replace(
        config.train,
        total_images=16_000,
        eval_interval_images=16_000,
        micro_batch_size=config.train.global_batch_size // num_ranks,
    )
    assert isinstance(config.model, TranslationConfig)
    return replace(config, model=replace(config.model, vocabulary=VOCABULARY), data=data, optim=optim, train=train)


def deep_config(config: RunConfig) -> RunConfig:
    """The same blocks, each applied so often that there are 108 applications, for two minutes of two cores."""
    assert isinstance(config.model, TranslationConfig)
    stages = tuple(replace(stage, num_loops=DEEP_LOOPS) for stage in config.model.stages)
    return replace(
        config,
        model=replace(config.model, stages=stages),
        memory=replace(config.memory, schedule="per_application"),
        optim=replace(config.optim, learning_rate=1e-3, warmup_images=320),
        train=replace(config.train, total_images=640, log_interval_steps=5, checkpoint_interval_images=640),
        telemetry=replace(config.telemetry, interval_steps=5),
    )


def run_text_demo(output: Path) -> int:
    """Everything into `output`, skipping what is there; the exit status of training where that failed, 1 for an alarm
    of the deep run, else 0."""
    started, metrics = time.monotonic(), bleu_and_chrf()
    output.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {text}", flush=True)

    for part in ("train", "dev", "test"):
        say(f"pairs of LibreOffice's help: {output / 'shards' / part}")
        pairs, text = output / f"{part}.tsv", TextWindows(window=WINDOW)
        write_whole(pairs, lzma.decompress((SAMPLE / f"{part}.tsv.xz").read_bytes()))
        vocabulary = VOCABULARY if part == "train" else None
        write_shards(WriteConfig(kind="tsv", source=pairs, text=text, vocabulary=vocabulary), output / "shards" / part)
    num_ranks = max(number for number in (1, 2, 4, 8, 16, 32) if number <= sum(choose_nodes().ranks_of_nodes))
    config = text_config(output, num_ranks)
    runs = {output / "translator": config, output / "deep": deep_config(config)}
    for run, one in runs.items():
        say(f"{one.model.num_applications} applications learn from {one.train.total_images:,} pairs: {run}")
        status = start_run(one, run, num_ranks=num_ranks)
        if status:
            return status
    say(f"translations of pages that it has not seen: {output / 'translations.tsv'}")
    rows = translations_of(output / "translator", output / "test.tsv")
    sources, found, references = (list(texts) for texts in zip(*rows, strict=True))
    scores = scores_of(metrics, [text.encode() for text in found], [text.encode() for text in sources], references)
    write_whole(output / "translations.tsv", "".join("\t".join(row) + "\n" for row in (COLUMNS, *rows)))
    short = [row for row in rows if len(row[0]) <= MOST_SHOWN_CHARACTERS]
    for row in short[:: len(short) // NUM_SHOWN][:NUM_SHOWN]:
        print("\n".join(f"  {name:<11} {text}" for name, text in zip(COLUMNS, row, strict=True)) + "\n")
    note = (
        f"Of {len(rows)} sentences BLEU {scores['bleu']:.1f} and chrF {scores['chrf']:.1f} after "
        f"{config.train.total_images:,} pairs; the German text as it is: {scores['bleu_of_copy']:.1f} and "
        f"{scores['chrf_of_copy']:.1f}. One seed and minutes of training: it shows that every part works, and no more."
    )
    write_report(list(runs), output / "report.html", note=note)
    say(f"page: {output / 'report.html'}")
    print(note)
    last_line, status = verdict(runs[output / "deep"].model.num_applications, alarms(load_run(output / "deep")))
    print(last_line)
    return status


def verdict(num_applications: int, found: list[str]) -> tuple[str, int]:
    """What is said of the deep run's alarms, and the exit status."""
    return f"{num_applications} applications: {'; '.join(found) or 'no alarm'}", 1 if found else 0


def translations_of(run: Path, pairs: Path) -> list[tuple[str, str, str]]:
    """COLUMNS of some pairs of a file, from all over it."""
    lines = [line.split("\t") for line in pairs.read_text(encoding="utf-8").split("\n")[:-1]]
    lines = lines[:: max(1, len(lines) // NUM_SCORED)]
    model = as_translator(load_model_of(run, None, None)[0], "the demo").eval()
    found = translated(model, tokens_of(load_config(run).data.tokens), [source.encode() for source, _ in lines])
    return [(source, text.decode(), target) for (source, target), text in zip(lines, found, strict=True)]
