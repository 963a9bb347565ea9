"""Language as a task: loss and bits against slow twins, a run from shards to text, the cache of loops, bad inputs."""

import contextlib
import json
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from data_pipelines.shards.index import open_shards
from data_pipelines.stream.loader import Batch, TrainLoader
from data_pipelines.text.pieces import TextWindows
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.cli import main
from sret_scale.config.recipes import recipe
from sret_scale.config.run_config import RunConfig, from_yaml, override, to_yaml
from sret_scale.model import TextConfig
from sret_scale.model.config import LoopOrder
from sret_scale.model.text.generation import LoopCache, WholePasses, continuation, reader_of
from sret_scale.model.text.kept_keys import CachePolicy, KeptKeys
from sret_scale.model.text.next_byte import NextByte
from sret_scale.tasks import task_of
from sret_scale.tasks.language import Language
from sret_scale.train.evaluate import evaluate
from tests.reference.bits import bits_per_byte
from tests.reference.loop_cache import read_by_token

CPU = torch.device("cpu")
DOCUMENTS = [b"To be, or not to be, that is the question." * 4, b"Exit.", bytes(range(60))]
TINY = ["model.width=8", "model.num_heads=2", "model.num_loops=2", "model.context=16"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of 16 bytes, in `train` without context and in `test` with 6 bytes of it."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "plays").mkdir()
    for number, document in enumerate(DOCUMENTS):
        (folder / "plays" / f"{number}.txt").write_bytes(document)
    for name, carried in (("train", 0), ("test", 6)):
        text = TextWindows(window=16, carried=carried)
        write_shards(WriteConfig(kind="text", source=folder / "plays", text=text), folder / name)
    return folder


def config(shards: Path, *changes: str) -> RunConfig:
    folders = [f"data.train_folder={shards / 'train'}", f"data.test_folder={shards / 'test'}"]
    return override(recipe("lm_tiny").config, [*TINY, *folders, *changes])


def built(one: RunConfig) -> NextByte:
    torch.manual_seed(1)
    model = one.model.build()
    assert isinstance(model, NextByte)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def a_batch(shards: Path, rows: int = 6) -> Batch:
    return next(iter(TrainLoader(open_shards(shards / "train"), context=16, micro_batch_size=rows, seed=3)))


@pytest.mark.lengthy
def test_bits_per_byte_are_those_of_one_byte_at_a_time(shards: Path) -> None:
    one = config(shards)
    model = built(one)
    result = evaluate(model, open_shards(shards / "test"), one)
    assert result is not None and result.num_samples == open_shards(shards / "test").num_samples
    expected = bits_per_byte(model, DOCUMENTS, carried=6)
    assert result.numbers["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    assert result.numbers["saved"] == pytest.approx(1 - expected / 8)
    assert result.numbers["loss"] == pytest.approx(expected * math.log(2))


def test_equal_odds_cost_eight_bits() -> None:
    task = Language(recipe("lm_tiny").config)
    assert task.numbers([3, 20, 20 * math.log(256)])["bits_per_byte"] == pytest.approx(8, abs=1e-12)


@pytest.mark.parametrize("parts", [2, 3])
def test_the_gradient_is_that_of_the_global_batch_however_it_is_cut(shards: Path, parts: int) -> None:
    """The mean over ranks, or over micro-batches, of one of 6 windows, of which some are short."""
    one, batch = config(shards), a_batch(shards)
    assert batch.views[:, 3].min() < 16
    model, task = built(one).train(), task_of(one)

    def gradient(rows: slice) -> list[torch.Tensor]:
        names = ("images", "labels", "indices", "valid", "views", "view_numbers")
        inputs = task.inputs(Batch(**{name: getattr(batch, name)[rows] for name in names}), seed=0, device=CPU)
        loss = task.loss(model(inputs.model_input), inputs, progress=0.0, loops=2)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    size = 6 // parts
    pieces = zip(*(gradient(slice(size * part, size * (part + 1))) for part in range(parts)), strict=True)
    for whole, cut in zip(gradient(slice(None)), pieces, strict=True):
        torch.testing.assert_close(torch.stack(cut).mean(0), whole, rtol=1e-12, atol=1e-12)


def test_context_and_filling_cost_nothing(shards: Path) -> None:
    one = config(shards)
    task, batch = Language(one), a_batch(shards)
    views = batch.views.clone()
    views[:, 1], views[:, 3] = 2, 5
    batch = replace(batch, views=views)
    inputs = task.inputs(batch, seed=0, device=CPU)
    nats = torch.arange(96, dtype=torch.float64).view(6, 16)
    assert task.loss(nats, inputs, progress=0.0, loops=1).item() == nats[:, 2:7].sum().item() / 96
    assert torch.equal(task.counts(nats, batch)[:, 1:], torch.stack([torch.full((6,), 5.0), nats[:, 2:7].sum(1)], 1))
    assert inputs.model_input[:, 0].eq(0).all() and inputs.model_input[:, 1:].equal(batch.images.long())


OPTIONS: list[dict[str, Any]] = [
    {},
    {"loop_order": "model", "num_loops": 3, "conditioning": "input_gated"},
    {"loop_order": "model_reversed", "num_loops": 3},
    {"num_loops": 4, "conditioning": "norm_per_loop", "norm_placement": "subln"},
    {"projections": "none", "norm_placement": "deepnorm"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_cache_of_loops_gives_what_whole_passes_give(shards: Path, options: dict[str, Any]) -> None:
    one = config(shards, *(f"model.{name}={value}" for name, value in options.items()))
    model, text = built(one), DOCUMENTS[0][:15]
    cached, whole = LoopCache(model), WholePasses(model)
    pieces = [b"\0" + text[:5], *(text[place : place + 1] for place in range(5, 15))]
    with torch.no_grad():
        for piece in pieces:
            torch.testing.assert_close(cached.scores(piece), whole.scores(piece), rtol=0, atol=1e-10)
    assert cached.num_read == whole.num_read == 16
    assert not [name for block in model.stages[0].blocks for name in vars(block.attention) if name == "attend"]


@pytest.mark.lengthy
@pytest.mark.parametrize("policy", get_args(CachePolicy))
@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("order", get_args(LoopOrder))
def test_named_policies_are_their_twins_and_hold_one_set_a_block(
    shards: Path, policy: CachePolicy, loops: int, order: str
) -> None:
    model = built(config(shards, f"model.loop_order={order}", f"model.num_loops={loops}", "model.num_blocks=2"))
    stage: Any = model.stages[0]
    x_BND = torch.randn(2, 7, model.config.stages[0].width, dtype=torch.float64)
    with torch.no_grad():
        twin = read_by_token(stage, x_BND, policy)
        keys, exact, by_token = KeptKeys([stage], policy), KeptKeys([stage]), KeptKeys([stage], policy)
        pieces = [x_BND[:, :4], x_BND[:, 4:5], x_BND[:, 5:6], x_BND[:, 6:]]
        ours, each = (torch.cat([one.read(piece) for piece in pieces], dim=1) for one in (keys, exact))
        torch.testing.assert_close(ours, twin, rtol=0, atol=1e-10)
        # However a text is cut into pieces, and on row 1 where rows are exchanged.
        tokens = [by_token.read(one) for one in x_BND[:, :3].unflatten(1, (-1, 1)).unbind(1)]
        torch.testing.assert_close(torch.cat(tokens, dim=1), twin[:, :3], rtol=0, atol=1e-10)
        by_token.select(torch.tensor([1, 1]))
        torch.testing.assert_close(by_token.read(x_BND[[1, 1], 3:4])[0], twin[1, 3:4], rtol=0, atol=1e-10)
    held, held_by_each = (
        sum(tensor.numel() for pair in one._kept.values() for tensor in pair) for one in (keys, exact)
    )
    assert held * (1 if policy == "each" else loops) == held_by_each
    assert torch.equal(ours, each) == (loops == 1 or policy == "each")


def test_a_sliced_model_has_no_other_cache(shards: Path) -> None:
    model = built(config(shards, "model.groups=[4,2]", "model.permutation=strided"))
    with pytest.raises(ValueError, match="--cache last: a model with slices reads whole rows and keeps no keys"):
        next(continuation(model, b"", temperature=0, seed=0, cache="last"))


@pytest.mark.parametrize("changes", [[], ["model.groups=[4,2]", "model.permutation=strided"]])
def test_greedy_text_is_the_likeliest_byte_again_and_again(shards: Path, changes: list[str]) -> None:
    """Beyond the context too, where reading begins again at half of it."""
    model = built(config(shards, *changes))
    assert isinstance(reader_of(model), WholePasses if changes else LoopCache)
    found, row = b"To be", b"\0To be"
    with torch.no_grad():
        for _ in range(30):
            inputs = torch.tensor([list(row.ljust(17, b"\0"))])
            scores = model.forward_head(model.forward_features(inputs))[0, len(row) - 1]
            found += bytes([int(scores.argmax())])
            row = row + found[-1:] if len(row) < 16 else b"\0" + found[-8:]
    assert b"To be" + bytes(islice(continuation(model, b"To be", temperature=0, seed=0), 30)) == found


@pytest.mark.lengthy
def test_drawn_text_is_a_function_of_the_seed_and_follows_the_odds(shards: Path) -> None:
    model = built(config(shards))
    first = [bytes(islice(continuation(model, b"", temperature=1.0, seed=seed), 8)) for seed in (1, 1, 2)]
    assert first[0] == first[1] != first[2]
    with torch.no_grad():
        odds = LoopCache(model).scores(b"\0").softmax(0)
    byte = int(odds.argmax())
    drawn = sum(next(continuation(model, b"", temperature=1.0, seed=seed)) == byte for seed in range(300))
    assert drawn / 300 == pytest.approx(odds[byte].item(), abs=4 * (odds[byte].item() / 300) ** 0.5)
    long_prompt = bytes(islice(continuation(model, b"x" * 40 + b"To be", temperature=0, seed=0), 4))
    assert long_prompt == bytes(islice(continuation(model, b"x" * 10 + b"To be", temperature=0, seed=0), 4))


def test_a_configuration_of_language_is_read_back(tmp_path: Path) -> None:
    one = recipe("lm_tiny").config
    (tmp_path / "run.yaml").write_text(to_yaml(one))
    assert from_yaml(tmp_path / "run.yaml") == one and isinstance(one.model, TextConfig)


@pytest.mark.multi_process
def test_a_run_from_shards_to_text(shards: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    run = tmp_path / "lm"
    folders = [f"data.train_folder={shards / 'train'}", f"data.test_folder={shards / 'test'}"]
    changes = ["train.total_images=48", "optim.warmup_images=8", "train.compile=none", "telemetry.interval_steps=2"]
    changes += ["model.permutation=strided", "model.groups=[2,1]", "memory.schedule=per_application"]
    batch = ["train.global_batch_size=8", "train.micro_batch_size=4"]
    assert main(["train", "lm_tiny", "--run", str(run), "--ranks", "2", *TINY, *folders, *changes, *batch]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    *_, last = (line for line in lines if line["kind"] == "eval")
    telemetry = [line for line in lines if line["kind"] == "telemetry"]
    assert telemetry and all(0 < one <= 1 for one in telemetry[0]["blocks"][0]["attention_entropy"])
    assert 0 < last["bits_per_byte"] < 9 and (run / "best.safetensors").exists()
    assert main(["report", str(run), "-o", str(tmp_path / "page.html")]) == 0
    assert "bits saved" in (tmp_path / "page.html").read_text()
    capfdbinary.readouterr()
    for weights in ("raw", "best"):
        assert main(["evaluate", str(run), "--json", "--weights", weights]) == 0
        assert json.loads(capfdbinary.readouterr().out)["bits_per_byte"] == pytest.approx(last["bits_per_byte"])
    assert main(["evaluate", str(run), "--loops", "1"]) == 0
    assert b"2 applications" in (out := capfdbinary.readouterr().out) and b"bits per byte" in out
    assert main(["generate", str(run), "--prompt", "To be", "--tokens", "9", "--temperature", "0"]) == 0
    assert (out := capfdbinary.readouterr().out).startswith(b"To be") and len(out) == 5 + 9 + 1
    for command, message in (
        (["generate", str(run), "--tokens", "0"], b"--tokens: expected at least 1, got 0"),
        (["generate", str(run), "--loops", "0"], b"--loops: expected at least 1, got 0"),
        (["generate", str(run), "--cache", "first"], b"--cache first: a model with slices reads whole rows"),
        (["evaluate", str(run), "--cache", "first"], b"--cache first is of translations: give --beam too"),
        (["generate", str(run), "--temperature", "-1"], b"--temperature: expected 0, or 0.001 and more, got -1"),
        (["generate", str(run), "--temperature", "nan"], b"--temperature: expected 0, or 0.001 and more, got nan"),
        (["evaluate", str(run), "--loops", "0"], b"--loops: expected at least 1, got 0"),
        (["evaluate", str(run), "--image-size", "8"], b"expected a model of kind 'vision', got one of kind 'language'"),
        (["evaluate", str(run), "--applications", "2,4"], b"expected a model of images, got one of kind 'language'"),
        (["evaluate", str(run), "--details", str(tmp_path / "d")], b"has task=language, and this is asked of classes"),
        (["predict", str(run), "a.png"], b"'vision', got one of kind 'language'"),
        (["export", str(run), str(tmp_path / "a.onnx")], b"expected a model of images, got one of kind 'language'"),
    ):
        with contextlib.chdir(tmp_path):
            Path("a.png").write_bytes(b"")
            status, err = main(command), capfdbinary.readouterr().err
        assert (status, message in err) == (2, True), err


@pytest.mark.slow
@pytest.mark.multi_process
def test_zero_3_computes_the_same(shards: Path, tmp_path: Path) -> None:
    """It gathers the weights of the stages, and those of the embedding again for the head."""
    folders = [f"data.train_folder={shards / 'train'}", f"data.test_folder={shards / 'test'}"]
    changes = [
        "train.total_images=32",
        "optim.warmup_images=8",
        "train.compile=none",
        "memory.schedule=per_application",
    ]
    found = []
    for name in ("zero0", "zero3"):
        run = ["--run", str(tmp_path / name), "--ranks", "2", f"engine.ds_config={name}", "train.micro_batch_size=4"]
        assert main(["train", "lm_tiny", *run, *TINY, *folders, *changes]) == 0
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found.append([line["loss"] for line in lines if line["kind"] in ("train", "eval")])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["task=classification"], "task=classification is of images: set task=language for a model of kind 'language'"),
        (["task=grid"], "task=grid is of images"),
        (["model=sret_t"], "task=language: expected a model of kind 'language', got 'vision'"),
        (["distill.teacher=run:x"], "task=language has no teacher"),
    ],
)
def test_what_does_not_fit_is_said(changes: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        task_of(override(recipe("lm_tiny").config, changes))
    assert message in str(caught.value)


def test_a_run_is_refused_before_it_starts(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    sample = Path(__file__).parents[2] / "data_pipelines/sample/fashion_mnist"
    write_shards(WriteConfig(kind="idx", source=sample, split="test"), images)
    text = [f"data.train_folder={shards / 'train'}", f"data.test_folder={shards / 'test'}"]
    both = [f"data.train_folder={images}", f"data.test_folder={images}"]
    for arguments, message in (
        (["lm_tiny", *both], "expected shards of text, got shards of images"),
        (["lm_tiny", text[0], both[1]], "expected shards of text, got shards of images"),
        (["demo_control_20", *text], "expected shards of images, got shards of text: task=language reads text"),
        (["lm_tiny", *text, "model.context=8"], "windows of 16 bytes do not fit into a context of 8"),
        (["lm_tiny", *text, "model.image_size=8"], "unknown key 'model.image_size'"),
        (["lm_tiny", *text, "model.num_loops=0"], "num_loops must be a whole number of at least 1"),
    ):
        assert main(["train", *arguments, "--run", str(tmp_path / "run"), "--ranks", "1"]) == 2
        assert message in (err := capsys.readouterr().err), err
        assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.multi_process
def test_a_run_of_images_does_not_write_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(run)]) == 2
    assert "generate: expected a model of kind 'language', got one of kind 'vision'" in capsys.readouterr().err
