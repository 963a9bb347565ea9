"""The commands on a backbone of timm: train, continue, describe, plan, evaluate, export, sweep, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sret_scale.config.timm_config import timm_config
from sret_scale.memory import MemoryConfig
from sret_scale.train.load_run import load_model
from tests.forked import sret_scale_forked
from tests.tiny import tiny_config, tiny_shards, write_config

pytestmark = pytest.mark.multi_process
SPEC = "timm:VisionTransformer?patch_size=7&embed_dim=16&depth=4&num_heads=2&image_size=28&num_classes=10"
TIED = f"{SPEC}&num_blocks=2&num_loops=3&projections=per_block&drop_path=0.1"


def say(folder: Path, *arguments: str | Path, status: int = 0) -> str:
    done = sret_scale_forked(*arguments, cwd=folder)
    assert done.returncode == status, done.stderr + done.stdout
    return done.stdout if status == 0 else done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a backbone that was named on the command line, of two steps."""
    folder = tmp_path_factory.mktemp("timm")
    config = tiny_config(tiny_shards(folder / "shards"))
    config = replace(config, optim=replace(config.optim, warmup_images=32), memory=MemoryConfig(schedule="binomial"))
    base = write_config(folder / "base.yaml", config, total_images=64)
    say(folder, "train", base, f"model={TIED}", "--run", "run", "--ranks", "1")
    return folder


def test_describe_and_plan_know_it(folder: Path) -> None:
    counts = json.loads(say(folder, "describe", TIED, "--json"))
    assert counts == json.loads((folder / "run" / "model.json").read_text()) | {"preset": TIED}
    assert "6" in say(folder, "describe", "run") and counts["applications"] == 6
    plan = json.loads(say(folder, "plan", TIED, "--memory", "4GiB", "--micro-batch", "8", "--json"))
    assert plan["micro_batch_size"] == 8 and plan["total_bytes"] <= 4 << 30
    started = say(folder, "train", TIED, "data.train_folder=shards/train", "data.test_folder=shards/test",
                  "train.global_batch_size=32", "train.micro_batch_size=32", "--dry-run", "--ranks", "1")  # fmt: skip
    assert "runs/VisionTransformer" in started and "kind: timm" in started


def test_evaluate_at_other_depths_and_export(folder: Path) -> None:
    found = json.loads(say(folder, "evaluate", "run", "--json"))
    deeper = json.loads(say(folder, "evaluate", "run", "--loops", "5", "--json"))
    assert (found["applications"], deeper["applications"]) == (6, 10) and found["num_samples"] == 128
    curve = json.loads(say(folder, "evaluate", "run", "--applications", "4,6", "--json"))
    (last,) = [one for one in curve["points"] if (one["applications"], one["read_out"]) == (6, "last")]
    assert last["top1"] == found["top1"]
    best = json.loads(say(folder, "evaluate", "run", "--weights", "best", "--json"))
    assert best["weights"] == "best"
    for name in ("run.onnx", "run.safetensors"):
        assert name in say(folder, "export", "run", name, "--format", "safetensors" if "safe" in name else "onnx")
    assert "kept.onnx" in say(folder, "export", "run", "kept.onnx", "--loops", "kept")
    assert "torch" in say(folder, "export", "run.safetensors", "again.pt2", "--format", "torch")


def test_a_sweep_varies_its_loops(folder: Path) -> None:
    (folder / "sweep.yaml").write_text("base: run/config.yaml\ngrid: {model.num_loops: [3, 6]}\n")
    table = say(folder, "sweep", "sweep.yaml", "--dry-run", "--ranks", "1")
    assert "12" in table and "6" in table


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["train", f"{SPEC}&num_loop=3"],
            "'num_loop'; keys of ours: num_blocks, num_loops, ",
        ),
        (["train", "base.yaml", f"model={SPEC}&num_blocks=3"], "num_blocks: expected a divisor of the 4 of blocks"),
        (["evaluate", "run", "--loops", "0"], "--loops: expected at least 1, got 0"),
        (["evaluate", "run", "--image-size", "56"], "expected a model of kind 'vision', got one of kind 'timm'"),
        (["evaluate", "run", "--early-exit", "confidence"], "early exit: expected a model of kind 'vision'"),
        (["train", "base.yaml", f"model={TIED}", "train.compile=blocks"], "whose blocks are not ours to compile"),
        (
            ["train", "base.yaml", f"model={TIED}", "model.num_loops=4", "--run", "run"],
            "holds a run of another configuration: model.stages.0.num_loops: 3 -> 4",
        ),
    ],
)
def test_what_cannot_be_is_said_and_exits_with_2(folder: Path, arguments: list[str], message: str) -> None:
    extra = ["--ranks", "1"] if arguments[0] == "train" else []
    assert message in say(folder, *arguments, *extra, status=2)


def test_a_checkpoint_with_other_loops_is_refused(folder: Path) -> None:
    """A run folder whose configuration says other loops than the weights that it has."""
    config = folder / "run" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("num_loops: 3", "num_loops: 4"))
    try:
        said = say(folder, "evaluate", "run", status=2)
        assert "was made by another architecture: stages.0.num_loops: 3 -> 4" in said
    finally:
        config.write_text(text)


def test_weights_of_the_untied_network_start_a_run_as_their_means(folder: Path) -> None:
    """A rate of nothing leaves them as they came in."""
    net = timm_config(TIED).network().state_dict()
    torch.save(net, folder / "net.pth")
    start = ["train", "base.yaml", f"model={TIED}", "train.initial_weights=net.pth"]
    say(folder, *start, "optim.learning_rate=1e-30", "optim.weight_decay=0", "--run", "healed", "--ranks", "1")
    found = load_model(folder / "healed", None, print)[0].state_dict()
    expected = (net["blocks.2.mlp.fc1.weight"] + net["blocks.3.mlp.fc1.weight"]) / 2
    torch.testing.assert_close(found["stages.0.blocks.1.inner.mlp.fc1.weight"], expected)
    assert torch.equal(found["net.patch_embed.proj.weight"], net["patch_embed.proj.weight"])
    wrong = f"model={TIED.replace('embed_dim=16', 'embed_dim=32')}"
    said = say(folder, *start, wrong, "--run", "wrong", "--ranks", "1", status=2)
    assert "net.pth does not fit VisionTransformer with 10 classes" in said


def test_a_cait_trains_with_telemetry(folder: Path) -> None:
    """Its class token, the network's first parameter, joins behind the chain."""
    spec = f"{SPEC.replace('VisionTransformer', 'Cait')}&num_blocks=1&num_loops=2"
    options = [f"model={spec}", "telemetry.interval_steps=1", "--run", "cait"]
    say(folder, "train", "base.yaml", *options, "--ranks", "1")
    records = [json.loads(line) for line in (folder / "cait" / "metrics.jsonl").read_text().splitlines()]
    looks = [record for record in records if record["kind"] == "telemetry"]
    assert [look["step"] for look in looks] == [0, 1]
    assert all(value > 0 for look in looks for value in look["blocks"][0]["gradient_norm"])


def test_a_backbone_labels_every_pixel_of_a_maze(folder: Path) -> None:
    for name, count in (("train", "64"), ("test", "8")):
        say(folder, "shards", "write", "mazes", f"mazes/{name}", "--count", count, "--size", "5", "--puzzle", "reach")
    sizes = "patch_size=1&embed_dim=16&timm.num_blocks=4&num_blocks=2&image_size=5&num_classes=2&head=tokens"
    grid = ["task=grid", f"model=timm:MlpMixer?{sizes}", "data.crop=none", "data.flip_rate=0"]
    places = ["data.train_folder=mazes/train", "data.test_folder=mazes/test"]
    say(folder, "train", "base.yaml", *grid, *places, "--run", "maze", "--ranks", "1")
    found = json.loads(say(folder, "evaluate", "maze", "--loops", "3", "--json"))
    assert 0 <= found["exact"] <= found["balanced"] <= 1 and found["applications"] == 6
    classes = [one.replace("&head=tokens", "") for one in grid]
    said = say(folder, "train", "base.yaml", *classes, *places, "--run", "none", "--ranks", "1", status=2)
    assert "task=grid needs a label for every token: set model.head=tokens, got classes" in said


def test_weights_of_a_run_start_another_and_other_kinds_are_refused(folder: Path) -> None:
    start = ["base.yaml", "train.initial_weights=run:run", "--ranks", "1"]
    say(folder, "train", *start, f"model={TIED}", "model.drop_path=0", "--run", "again", "--dry-run")
    assert "of kind timm, the model is vision" in say(folder, "train", *start, "--run", "other", status=2)
