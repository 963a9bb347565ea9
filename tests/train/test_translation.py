"""Translation as a task: packing, loss on any ranks, a run from a tsv to BLEU, lines in and out, bad inputs."""

import contextlib
import hashlib
import io
import json
import math
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from data_pipelines.shards.index import open_shards
from data_pipelines.stream.loader import Batch, TrainLoader
from data_pipelines.text.pieces import TextWindows
from data_pipelines.text.tokens import Bytes, tokens_of, train_pieces
from data_pipelines.writing.prepare import ImageOptions
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.cli import main
from sret_scale.config.recipes import recipe
from sret_scale.config.run_config import RunConfig, from_yaml, override, to_yaml
from sret_scale.model import TranslationConfig, describe
from sret_scale.model.text import token_model
from sret_scale.model.text.translator import Translator
from sret_scale.runs.checkpoint import list_checkpoints, read_state
from sret_scale.tasks import task_of
from sret_scale.tasks.translation import Pair, check_fits, counted_tokens, packed
from sret_scale.train.assemble import as_trained
from sret_scale.train.evaluate import evaluate
from sret_scale.train.load_run import check_text, load_facts

CPU = torch.device("cpu")
PAIRS = [
    ("Datei \u00f6ffnen", "Open file"),
    ("Ja", "Yes"),
    ("Speichern unter", "Save as"),
    ("Nein", "No"),
    ("Ende", "End"),
]
TINY = ["model.width=8", "model.num_heads=2", "model.num_loops=2", "model.context=24", "model.vocabulary=256"]


def write_pairs(folder: Path, pairs: list[tuple[str, str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in pairs))
    options = ImageOptions(metadata=False)
    source, text = folder / "pairs.tsv", TextWindows(window=64)
    write_shards(WriteConfig(kind="tsv", source=source, text=text, options=options), folder / "set")
    return folder / "set"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), PAIRS * 4)


def config(shards: Path, *changes: str) -> RunConfig:
    folders = [f"data.train_folder={shards}", f"data.test_folder={shards}"]
    return override(recipe("nmt_tiny").config, [*TINY, *folders, *changes])


def built(one: RunConfig) -> Translator:
    torch.manual_seed(1)
    model = one.model.build()
    assert isinstance(model, Translator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def nats_of(model: Translator, source: bytes, target: bytes) -> float:
    """The slow twin: one pair, a byte at a time."""
    total, tokens = 0.0, [*target, 0]
    for place, token in enumerate(tokens):
        features = model.forward_features(packed([(list(source), tokens[:place])], model.config.context))
        total -= float(model.forward_head(features)[0, place].log_softmax(dim=-1)[token])
    return total


def test_an_evaluation_is_that_of_one_token_at_a_time(shards: Path) -> None:
    one = config(shards, "train.micro_batch_size=3")
    model = built(one)
    result = evaluate(model, open_shards(shards), one)
    assert result is not None and result.num_samples == 20
    with torch.no_grad():
        nats = sum(nats_of(model, source.encode(), target.encode()) for source, target in PAIRS)
    tokens = sum(len(target.encode()) + 1 for _, target in PAIRS)
    assert result.numbers["loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert result.numbers["saved"] == pytest.approx(1 - nats / tokens / math.log(256), rel=1e-6)


def test_training_alone_smooths_labels_as_torch_does(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, over the tokens that count; an evaluation has plain nats."""
    one = config(shards, "distill.label_smoothing=0.1", "model.dropout=0")
    model, task = as_trained(built(one), one), task_of(one)
    batch = next(iter(TrainLoader(open_shards(shards), micro_batch_size=6, context=1, seed=3)))
    inputs = task.inputs(batch, seed=0, device=CPU)
    rows_R4M = inputs.model_input
    scores_RNV, counted_RN = model.forward_head(model.forward_features(rows_R4M)), counted_tokens(rows_R4M)
    monkeypatch.setattr(token_model, "CHUNK_TOKENS", 7)
    losses = {}
    for smoothing, mode in ((0.1, True), (0.0, False)):
        nats_T = cross_entropy(
            scores_RNV[counted_RN], rows_R4M[:, 2, 1:][counted_RN], label_smoothing=smoothing, reduction="sum"
        )
        losses[mode] = task.loss(model.train(mode)(rows_R4M), inputs, progress=0.0, loops=2)
        torch.testing.assert_close(losses[mode], nats_T / (6 * 24), rtol=1e-6, atol=0)
        gradients = (
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in (losses[mode], nats_T)
        )
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs / (6 * 24), rtol=1e-5, atol=1e-9)
    assert losses[True] > losses[False]


@pytest.mark.parametrize("parts", [2, 3])
def test_the_gradient_is_that_of_the_global_batch_however_it_is_cut(shards: Path, parts: int) -> None:
    """The mean over ranks, or over micro-batches, of one of 6 pairs of several lengths, packed anew in each."""
    one = config(shards)
    batch = next(iter(TrainLoader(open_shards(shards), micro_batch_size=6, context=1, seed=3)))
    model, task = built(one).train(), task_of(one)

    def gradient(rows: slice) -> list[torch.Tensor]:
        names = [field.name for field in fields(Batch) if field.name != "maps"]
        inputs = task.inputs(Batch(**{name: getattr(batch, name)[rows] for name in names}), seed=0, device=CPU)
        loss = task.loss(model(inputs.model_input), inputs, progress=0.0, loops=2)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    size = 6 // parts
    pieces = zip(*(gradient(slice(size * part, size * (part + 1))) for part in range(parts)), strict=True)
    for whole, cut in zip(gradient(slice(None)), pieces, strict=True):
        torch.testing.assert_close(torch.stack(cut).mean(0), whole, rtol=1e-5, atol=1e-9)


token_lists = st.lists(st.integers(1, 9), min_size=1, max_size=9)


@settings(deadline=None)
@given(st.lists(st.tuples(token_lists, token_lists), max_size=12))
def test_every_pair_lies_whole_in_one_row(pairs: list[Pair]) -> None:
    rows = packed(pairs, 10)
    found = []
    for row in rows:
        for number in range(1, int(row[3].max()) + 1):
            source, target = (row[side][row[side + 1] == number].tolist() for side in (0, 2))
            assert target[0] == 0
            found.append((source, target[1:]))
        # What follows a target is 0, and no place is left free between two pairs.
        assert not row[0][row[1] == 0].any() and not row[2][row[3] == 0].any()
        assert row[1][row[1] > 0].tolist() == sorted(row[1].tolist())[int((row[1] == 0).sum()) :]
    assert sorted(found) == sorted(pairs)
    assert int(counted_tokens(rows).sum()) == sum(1 + len(target) for _, target in pairs)
    assert len(rows) <= max(1, len(pairs))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of 290 tokens: bytes, characters, and what is frequent in these texts."""
    file = tmp_path_factory.mktemp("tokens") / "tokens.model"
    file.write_bytes(train_pieces([side for pair in PAIRS * 20 for side in pair], 290))
    return file


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Zs", "Cf", "Cn", "Co"]), max_size=30))
def test_tokens_are_read_back(pieces: Path, text: str) -> None:
    """Up to the normal form that sentencepiece has; bytes exactly."""
    for tokens in (tokens_of(None), tokens_of(str(pieces))):
        numbers = tokens.encode(text.encode())
        assert all(0 < number < tokens.num_tokens for number in numbers)
        again = tokens.decode(numbers)
        assert tokens.encode(again) == numbers
    assert tokens_of(None).decode(tokens_of(None).encode(text.encode())) == text.encode()


def test_pieces_are_the_same_again_and_a_vocabulary_that_the_texts_do_not_give_is_refused(pieces: Path) -> None:
    texts = [side for pair in PAIRS * 20 for side in pair]
    assert train_pieces(texts, 290) == pieces.read_bytes()
    for vocabulary, reason in (
        (4000, "4,000 pieces: Vocabulary size too high"),
        (100, "100 pieces: Vocabulary size is"),
    ):
        with pytest.raises(ValueError, match=reason):
            train_pieces(texts, vocabulary)


def translate(run: Path, text: bytes, *options: str) -> int:
    stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(text))
    try:
        return main(["translate", str(run), *options])
    finally:
        sys.stdin = stdin


def check_refusals(run: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Input that is no text, too long, or asked for in a way that there is not."""
    for text, options, message in (
        (b"\xff\n", [], b"line 1: expected text in UTF-8"),
        (b"x\n" * 256 + b"x" * 99, [], b"text 257, 'xxxxxx"),
        (b"", ["--beam", "0"], b"--beam: expected 1 to 64, got 0"),
        (b"", ["--loops", "0"], b"--loops: expected at least 1, got 0"),
    ):
        assert translate(run, text, *options) == 2
        assert message in (err := capfdbinary.readouterr().err), err
    for blank in (b"", b"\n", "\u3000\n".encode()):
        assert translate(run, blank) == 0 and capfdbinary.readouterr().out == b"\n" * bool(blank)
    assert main(["generate", str(run)]) == 2
    assert (
        b"generate: expected a model of kind 'language', got one of kind 'translation'" in capfdbinary.readouterr().err
    )


def check_distillation(run: Path, folder: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Of whole sentences: what a model made of the sources becomes a set; what it left empty is left out."""
    sources = [source.encode() for source, _ in PAIRS]
    assert translate(run, b"\n".join(sources) + b"\n", "--beam", "2") == 0
    taught = list(zip(sources, capfdbinary.readouterr().out.splitlines(), strict=True))
    (folder / "taught.tsv").write_bytes(b"".join(source + b"\t" + target + b"\n" for source, target in taught))
    command = ["shards", "write", "tsv", str(folder / "taught.tsv"), str(folder / "taught"), "--window", "256"]
    assert main([*command, "--on-bad", "skip", "--max-bad-rate", "1"]) == 0
    assert open_shards(folder / "taught").num_samples == sum(bool(target.strip()) for _, target in taught)
    capfdbinary.readouterr()


@pytest.mark.multi_process
def test_a_run_from_a_tsv_to_translations(
    shards: Path, pieces: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    run, tokens = tmp_path / "nmt", tmp_path / "copied.model"
    tokens.write_bytes(pieces.read_bytes())
    vocabulary = tokens_of(str(tokens)).num_tokens
    folders = [f"data.train_folder={shards}", f"data.test_folder={shards}", f"data.tokens={tokens}"]
    changes = [*TINY, f"model.vocabulary={vocabulary}", "train.total_images=32", "optim.warmup_images=8"]
    changes += ["telemetry.interval_steps=2", "memory.schedule=per_application"]
    changes += ["train.global_batch_size=8", "train.micro_batch_size=4"]
    command = ["train", "nmt_tiny", "--run", str(run), "--ranks", "2", *folders, *changes]
    assert main(command) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    *_, last = (line for line in lines if line["kind"] == "eval")
    assert 0 < last["loss"] < 8 and (run / "best.safetensors").exists()
    # The run has tokens of its own, and goes on with no others, wherever their file lies.
    (moved := tmp_path / "moved.model").write_bytes(pieces.read_bytes())
    assert main([*command, f"data.tokens={moved}"]) == 0
    tokens.write_bytes(other_tokens := train_pieces([side[::-1] for pair in PAIRS * 20 for side in pair], 290))
    for others in ([], ["data.tokens=null", "model.vocabulary=256"]):
        assert main([*command, *others]) == 2 and b"other tokens than" in capfdbinary.readouterr().err
    tokens.unlink()
    digest = hashlib.sha256(pieces.read_bytes()).hexdigest()
    for said in (
        load_facts(run),
        load_facts(run / "best.safetensors"),
        read_state(list_checkpoints(run / "checkpoints")[0]),
    ):
        assert said["tokens_sha256"] == digest
    # Nor do its weights work, or start another run, with others.
    tokens.write_bytes(other_tokens)
    changed = [f"train.initial_weights=run:{run}", f"data.tokens={tokens}", "--run", str(tmp_path / "next")]
    assert main([*command, *changed]) == 2 and digest.encode() in capfdbinary.readouterr().err
    # What has no weights may differ.
    tokens.write_bytes(pieces.read_bytes())
    assert main([*command, *changed, "model.dropout=0.1", "--dry-run"]) == 0
    tokens.write_bytes(other_tokens)
    (run / "tokens.model").write_bytes(tokens.read_bytes())
    assert (
        translate(run, b"Ja") == 2
        and b"trained with" in (err := capfdbinary.readouterr().err)
        and err.count(b"\n") == 1
    )
    (run / "tokens.model").write_bytes(pieces.read_bytes())
    assert main(["evaluate", str(run), "--json", "--weights", "raw", "--beam", "2", "--cache", "last"]) == 0
    result = json.loads(capfdbinary.readouterr().out)
    assert result["loss"] == pytest.approx(last["loss"])
    assert (
        0 <= result["bleu"] <= 100
        and "version:2" in result["bleu_signature"]
        and result["bleu_of_copy"] < 50
        and result["cache"] == "last"
    )
    assert main(["evaluate", str(run), "--loops", "1", "--beam", "1"]) == 0
    assert b"BLEU" in (out := capfdbinary.readouterr().out) and b"4 applications" in out and b"20 pairs" in out
    assert translate(run, "Ja\n\nDatei\u2028\u00f6ffnen\r\nohne Ende".encode()) == 0
    translated = capfdbinary.readouterr().out.split(b"\n")
    assert len(translated) == 5 and translated[1] == translated[4] == b""
    check_distillation(run, tmp_path, capfdbinary)
    check_refusals(run, capfdbinary)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["task=language"], "task=language: expected a model of kind 'language', got 'translation'"),
        (["task=classification"], "set task=translation for a model of kind 'translation'"),
        (["distill.teacher=run:x"], "task=translation has no teacher"),
        (["data=5"], "data"),
        (["data.tokens=auto", "data.train_folder=null"], "data.train_folder"),
        (["model.vocabulary=300"], "data.tokens=null, bytes has 256 tokens: set model.vocabulary to that, got 300"),
        (["data.tokens=setup.cfg"], "setup.cfg: expected a model of sentencepiece"),
    ],
)
def test_what_does_not_fit_is_said(shards: Path, changes: list[str], message: str) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        task_of(config(shards, *changes))
    assert message in str(caught.value)


def test_a_pair_beyond_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a pair of 3 and 1 \+ 10 tokens .* set model\.context=16"):
        packed([([1, 2, 3], [1] * 10)], 10)


def test_a_pair_beyond_the_context_is_found_before_a_run(shards: Path) -> None:
    """Where bytes are as many as tokens, and where they are more, since tokens are what counts."""
    short = config(shards, "model.context=8")
    check_fits(open_shards(shards), Bytes(), 64)
    with pytest.raises(ValueError, match=r"sample .*: a pair of \d+ tokens does not fit into a context of 8"):
        check_text(open_shards(shards), short)

    class Halves(Bytes):
        def encode(self, text: bytes) -> list[int]:
            return [0] * (len(text) // 8)

    check_fits(open_shards(shards), Halves(), 8)


def test_a_configuration_of_translation_is_read_back(tmp_path: Path) -> None:
    one = recipe("nmt_tiny").config
    (tmp_path / "run.yaml").write_text(to_yaml(one))
    assert from_yaml(tmp_path / "run.yaml") == one and isinstance(one.model, TranslationConfig)


def test_a_run_is_refused_before_it_starts(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"text " * 20)
    write_shards(WriteConfig(kind="text", source=tmp_path / "a.txt", text=TextWindows(window=16)), tmp_path / "windows")
    for name, folder, message in (
        ("lm_tiny", shards, "shards of pairs are not for task=language"),
        ("nmt_tiny", tmp_path / "windows", "shards of windows are not for task=translation"),
    ):
        folders = [f"data.train_folder={folder}", f"data.test_folder={folder}"]
        changes = ["model.vocabulary=256"] if name == "nmt_tiny" else []
        assert main(["train", name, *folders, *changes, "--run", str(tmp_path / "run"), "--ranks", "1"]) == 2
        assert message in (err := capsys.readouterr().err), err


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("name", "sizes", "num_parameters"),
    [("iwslt14_recursive", (3, 2, 512, 1024, 4), 27.7e6), ("wmt14_recursive", (6, 2, 512, 2048, 8), 73.7e6)],
)
def test_a_recipe_of_known_sets_starts_on_files_of_their_layout(
    name: str, sizes: tuple[int, ...], num_parameters: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small fake of what fairseq's scripts leave: two files a part, an empty line among them; and nothing is run."""
    folder = name.removesuffix("_recursive")
    with contextlib.chdir(tmp_path):
        for part in ("train", "valid"):
            pairs = [*(PAIRS * 300 if part == "train" else PAIRS), ("", "left out")]
            for side, language in enumerate(("de", "en")):
                Path(f"{part}.de-en.{language}").write_text("".join(pair[side] + "\n" for pair in pairs))
            command = ["shards", "write", "moses", f"{part}.de-en.de,{part}.de-en.en", f"shards/{folder}/{part}"]
            options = ["--on-bad", "skip", "--max-bad-rate", "0.5", "--window", "2048"]
            assert main([*command, *options, *(["--vocabulary", "290"] if part == "train" else [])]) == 0
        capsys.readouterr()
        assert main(["train", name, "--dry-run", "--ranks", "1", "--run", "run", "model.vocabulary=290"]) == 0
        printed = capsys.readouterr().out
        assert not Path("run").exists() and "label_smoothing: 0.1" in printed
        assert main(["train", name, "--dry-run", "--ranks", "1", "data.train_folder=none"]) == 2
        assert "none/tokens.model" in capsys.readouterr().err
        assert f"tokens: {Path(f'shards/{folder}/train/tokens.model').absolute()}" in printed
        assert main(["train", name, "--dry-run", "--ranks", "1", "--run", "run"]) == 2
        assert "tokens.model has 290 tokens: set model.vocabulary to that" in capsys.readouterr().err
    chosen = recipe(name).config
    assert isinstance(chosen.model, TranslationConfig)
    for stage in chosen.model.stages:
        found = (stage.num_blocks, stage.num_loops, stage.width, stage.hidden_width, stage.num_heads)
        assert found == sizes
    assert describe(chosen.model)["parameters"] == pytest.approx(num_parameters, rel=0.01)


@pytest.mark.slow
@pytest.mark.multi_process
def test_zero_3_computes_the_same(shards: Path, tmp_path: Path) -> None:
    """It gathers the weights of the stages, the keys of the memory among them, and the embedding again for the head."""
    folders = [f"data.train_folder={shards}", f"data.test_folder={shards}"]
    changes = ["train.total_images=32", "optim.warmup_images=8", "memory.schedule=per_application"]
    changes += ["train.global_batch_size=8", "train.micro_batch_size=4"]
    found = []
    for name in ("zero0", "zero3"):
        run = ["--run", str(tmp_path / name), "--ranks", "2", f"engine.ds_config={name}"]
        assert main(["train", "nmt_tiny", *run, *TINY, *folders, *changes]) == 0
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found.append([line["loss"] for line in lines if line["kind"] in ("train", "eval")])
    assert len(found[0]) > 1 and found[0] == pytest.approx(found[1], rel=1e-6)
