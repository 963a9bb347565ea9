"""Mutated files in every reader: a command ends with status 0 or 2 (1 where it says so), never with a traceback."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from data_pipelines.labels.store import read_plan
from data_pipelines.stream.quarantine import Quarantine
from sret_scale.lab.experiments.declared import PlannedRun
from sret_scale.lab.experiments.metrics_tail import standing_of
from sret_scale.lab.experiments.pool import RunState
from sret_scale.lab.experiments.sweep_view import cells
from sret_scale.launch.launcher import exit_status
from sret_scale.model import SReT, preset
from sret_scale.model.vision.official import to_published
from sret_scale.model.vision.weight_files import save_model
from sret_scale.runs.checkpoint import read_tensors
from sret_scale.runs.rank_errors import RankError, write_error
from sret_scale.runs.run_folder import RunFolder
from sret_scale.train.load_run import load_facts, load_trained
from sret_scale.train.watchdog import Watchdog
from tests.data.shard_sources import encoded, pixels
from tests.fuzz_reader import MOST_S
from tests.hand_made import make_labels, make_run
from tests.tiny import ROOT, environment, tiny_config, tiny_shards

pytestmark = pytest.mark.multi_process

HOSTILE: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 10**12, 10**400, 1e308, float("inf"), float("nan"), "", "x", "\x1b]0;owned\x07\x1b[31m"),
    *([], {}, [[]], {"a": 1}, ["\ud800"], "9" * 400, "../../etc/passwd", "/dev/zero", "\u202e", 2**63, -(2**63), 2**31),
)
NUM_MUTATIONS = 40


def changed(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value in which one place, anywhere, holds something else or nothing."""
    value = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, inner in list(node.items() if isinstance(node, dict) else enumerate(node)):
            places.append((node, key))
            if isinstance(inner, dict | list):
                walk(inner)

    walk(value)
    node, key = rng.choice(places)
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice(HOSTILE)
    return value


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes cut off, emptied, with bytes changed, or with a nest or a long number in them."""
    place = rng.randrange(len(data))
    return rng.choice(
        (
            data[:place],
            b"",
            data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :],
            data[:place] + b"[" * 100_000,
            data[:place] + b"9" * 5000 + data[place:],
            b"\x00" * len(data),
            b"\xef\xbb\xbf" + data,
        )
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a run, a store of labels and native weights."""
    folder = tmp_path_factory.mktemp("made")
    config = tiny_config(tiny_shards(folder / "shards"))
    make_run(folder / "run", config)
    make_labels(folder / "store", folder / "shards" / "train", config)
    shutil.copytree(folder / "run", folder / "teacher")
    save_model(load_trained(folder / "run"), folder / "weights.safetensors")
    save_model(
        load_trained(folder / "run"), folder / "run" / "best.safetensors", {**load_facts(folder / "run"), "step": 1}
    )
    shutil.copy(folder / "run" / "best.safetensors", folder / "exported.safetensors")
    (folder / "image.png").write_bytes(encoded(pixels(0, 28, 28), "PNG"))
    published = preset("sret_t", image_size=32, num_classes=3, group_fit="nearest")
    # Beside the folder, since every other case copies that.
    torch.save({"model": to_published(published, SReT(published).state_dict())}, folder.with_name("published.pth"))
    (folder / "sweep.yaml").write_text("base: run/config.yaml\ngrid: {model.stages.1.num_loops: [2, 4]}\nretries: 1\n")
    return folder


Ask = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz_reader"],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin and process.stdout
        stdin, stdout = process.stdin, process.stdout

        def one(*arguments: object) -> tuple[int, str]:
            stdin.write(json.dumps(list(map(str, arguments))) + "\n")
            stdin.flush()
            line = stdout.readline()
            assert line, f"the process died of {arguments}"
            status, text = json.loads(line)
            return status, text

        yield one
        stdin.close()


def sealed_checkpoint(checkpoint: Path) -> None:
    """The manifest of a checkpoint made anew for its files."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in checkpoint.iterdir()
        if file.name != "manifest.json"
    }
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def mutate_json(file: Path, rng: random.Random) -> None:
    if rng.random() < 0.7:
        file.write_text(json.dumps(changed(json.loads(file.read_text()), rng)))
    else:
        file.write_bytes(damaged(file.read_bytes(), rng))


def mutate_yaml(file: Path, rng: random.Random) -> None:
    if rng.random() < 0.7:
        file.write_text(yaml.safe_dump(changed(yaml.safe_load(file.read_text()), rng)))
    else:
        file.write_bytes(damaged(file.read_bytes(), rng))


def mutate_lines(file: Path, rng: random.Random) -> None:
    lines = file.read_text().splitlines()
    place = rng.randrange(len(lines))
    lines[place] = json.dumps(changed(json.loads(lines[place]), rng))
    file.write_text("\n".join(lines) + "\n")


def mutate_bytes(file: Path, rng: random.Random) -> None:
    file.write_bytes(damaged(file.read_bytes(), rng))


def mutate_weights(file: Path, rng: random.Random) -> None:
    if rng.random() < 0.3:
        file.write_bytes(damaged(file.read_bytes(), rng))
        return
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        config = json.loads(opened.metadata()["sret_config"])
    save_file(tensors, file, metadata={"sret_config": json.dumps(changed(config, rng))})


def mutate_facts(file: Path, rng: random.Random) -> None:
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        facts = opened.metadata()
    name = rng.choice([name for name in facts if name != "sret_config"])
    value = json.loads(facts.pop(name)) if name != "format" else "pt"
    if rng.random() < 0.5 and isinstance(value, dict | list):
        facts[name] = json.dumps(changed(value, rng))
    elif rng.random() < 0.5:
        facts[name] = rng.choice((json.dumps(rng.choice(HOSTILE)), "[" * 100_000, "9" * 5000, "\x1b[31m"))
    save_file(tensors, file, metadata=facts)


def mutate_published(file: Path, rng: random.Random) -> None:
    if rng.random() < 0.3:
        file.write_bytes(damaged(file.read_bytes(), rng))
        return
    content = torch.load(file, weights_only=True)
    tensors = content["model"]
    name = rng.choice(list(tensors))
    value = tensors.pop(name)
    others = (value[:0], value.double(), value.flatten()[:1].expand(2**40), value.to(torch.int8), value * float("nan"))
    if rng.random() < 0.8:
        tensors[rng.choice((name, "x\x1b[31m", 7))] = rng.choice((*others, *HOSTILE))
    torch.save(rng.choice((content, content, tensors, [tensors], {"model": [1]})), file)


CASES: dict[str, tuple[str, Callable[[Path, random.Random], None], tuple[str, ...]]] = {
    "plan": ("store/plan.json", mutate_json, ("labels", "info", "store")),
    "header": ("store/header.json", mutate_json, ("labels", "info", "store")),
    "state": ("run/checkpoints/step-000000001/state.json", mutate_json, ("checkpoint", "info", "run")),
    "manifest": ("run/checkpoints/step-000000001/manifest.json", mutate_json, ("checkpoint", "verify", "run")),
    "config": ("run/config.yaml", mutate_yaml, ("evaluate", "run", "--dry-run")),
    "weights": (
        "weights.safetensors",
        mutate_weights,
        ("export", "weights.safetensors", "o", "--format", "safetensors"),
    ),
    "best weights": ("run/best.safetensors", mutate_weights, ("evaluate", "run", "--weights", "best")),
    "best facts": ("run/best.safetensors", mutate_facts, ("evaluate", "run", "--weights", "best")),
    "predicting facts": ("exported.safetensors", mutate_facts, ("predict", "exported.safetensors", "image.png")),
    "published": ("published.pth", mutate_published, ("weights", "import", "published.pth", "o")),
    **{
        f"teacher {name}": (
            f"teacher/{name}",
            mutate,
            ("labels", "write", "shards/train", "o", "--teacher", "run:MADE/teacher", "--views", "1", "--top-k", "3"),
        )
        for name, mutate in (("config.yaml", mutate_yaml), ("checkpoints/step-000000001/state.json", mutate_json))
    },
    "sweep": (
        "sweep.yaml",
        mutate_yaml,
        ("slurm", "--array", "2", "--nodes", "1", "--cpus", "1", "--time", "1:00:00", "--", "sweep", "sweep.yaml"),
    ),
    "sweep table": ("sweep.yaml", mutate_yaml, ("sweep", "sweep.yaml", "--dry-run")),
    **{
        f"head {name}": (f"shards/train/{name}", mutate, ("shards", "head", "shards/train", "o.png", "--count", "3"))
        for name, mutate in (
            ("manifest.json", mutate_json),
            ("index.npz", mutate_bytes),
            ("shard-000000.tar", mutate_bytes),
        )
    },
    **{
        f"report {name}": (f"run/{name}", mutate, ("report", "run", "-o", "o.html"))
        for name, mutate in (
            ("status.json", mutate_json),
            ("environment.json", mutate_json),
            ("model.json", mutate_json),
            ("config.yaml", mutate_yaml),
            ("metrics.jsonl", mutate_lines),
        )
    },
}


@pytest.mark.timeout(NUM_MUTATIONS * MOST_S)
@pytest.mark.parametrize("name", CASES)
def test_a_mutated_file_ends_no_command_with_a_traceback(made: Path, tmp_path: Path, ask: Ask, name: str) -> None:
    rng = random.Random(name)
    file, mutate, command = CASES[name]
    names = {"store", "run", "weights.safetensors", "published.pth", "sweep.yaml", "o", "o.html"}
    names |= {"shards/train", "o.png", "exported.safetensors", "image.png"}
    copy = tmp_path / "made"
    for number in range(NUM_MUTATIONS if name.split()[0] not in ("report", "teacher", "published", "best") else 12):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(made, copy)
        if name == "published":
            shutil.copy(made.with_name(file), copy)
        mutate(copy / file, rng)
        status, text = ask(*(copy / word if word in names else word.replace("MADE", str(copy)) for word in command))
        kept = (copy / file).read_bytes()[:2000]
        assert status in (0, 1, 2) and "Traceback" not in text, (number, text, kept)
        assert status == 0 or "error: " in text or "damaged: " in text, (number, text, kept)
        assert not any(ord(c) < 32 and c not in "\n\t" for c in text), (number, ascii(text), kept)


@pytest.mark.timeout(300)
def test_a_sealed_state_of_other_types_is_refused(made: Path, tmp_path: Path, ask: Ask) -> None:
    rng = random.Random(1)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000000001"
    for _ in range(20):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(made / "run", tmp_path / "run")
        mutate_json(checkpoint / "state.json", rng)
        sealed_checkpoint(checkpoint)
        status, text = ask("export", tmp_path / "run", tmp_path / "o", "--format", "safetensors")
        assert status in (0, 2) and "Traceback" not in text, (text, (checkpoint / "state.json").read_text()[:500])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["ema", "optimizer"])
def test_sealed_tensors_of_a_checkpoint_that_are_damaged_are_refused(
    made: Path, tmp_path: Path, ask: Ask, name: str
) -> None:
    rng = random.Random(name)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000000001"
    for _ in range(12):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(made / "run", tmp_path / "run")
        file = checkpoint / f"{name}.safetensors"
        if name == "optimizer":
            shutil.copy(checkpoint / "ema.safetensors", file)
        data = file.read_bytes()
        # The header of the format is its length and JSON; what stands behind it are values, of which all are legal.
        place = rng.randrange(8 + int.from_bytes(data[:8], "little"))
        file.write_bytes(data[:place] + rng.choice((b"", b"\xff" * 8, b"9" * 5000, b"[" * 100_000)) + data[place + 8 :])
        sealed_checkpoint(checkpoint)
        if name == "ema":
            status, text = ask("export", tmp_path / "run", tmp_path / "o", "--format", "safetensors")
            assert status == 2 and "error: " in text and "ema" in text and "Traceback" not in text, text
        else:
            with pytest.raises((ValueError, OSError), match="optimizer"):
                read_tensors(checkpoint, name)


def test_a_mutated_quarantine_is_counted_on_or_refused_with_its_name(tmp_path: Path) -> None:
    rng = random.Random("quarantine")
    file = tmp_path / "quarantine.jsonl"
    line = {"index": 3, "epoch": 0, "rank": 0, "world_size": 1, "shard": "a.tar", "key": "k", "reason": "r"}
    for _ in range(200):
        file.write_text("".join(json.dumps({**line, "index": index}) + "\n" for index in range(4)))
        (mutate_lines if rng.random() < 0.7 else mutate_bytes)(file, rng)
        try:
            assert 0 <= Quarantine(str(file), max_bad_rate=1.0, samples_per_epoch=100).count <= 4
        except ValueError as error:
            assert str(file) in str(error), error


def test_mutated_files_of_ranks_are_named_to_whoever_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random("ranks")
    folder = RunFolder(tmp_path)
    beat, error = tmp_path / "heartbeats" / "rank-00001.json", tmp_path / "errors" / "rank-00001.json"
    line = {"kind": "train", "step": 1, "images": 32, "time_s": 1.0, "loss": 2.3, "images_per_s": 9.0}
    run = PlannedRun(name="a", config=tiny_config(tmp_path), applications=1, parameters=1, macs=1)
    with Watchdog(tmp_path, rank=0, world_size=2, timeout_s=100.0) as dog:
        dog._beat()
        for _ in range(200):
            beat.write_text(json.dumps({"step": 5, "phase": "computing", "since_s": 0.0, "host": "b"}))
            error.unlink(missing_ok=True)
            write_error(tmp_path, RankError(time_s=1.0, rank=1, host="b", message="m", exit_code=1, trace="t"))
            folder.write_status("finished", 0)
            folder.metrics.write_text(json.dumps(line) + "\n")
            for file in (beat, error, folder.status):
                mutate_json(file, rng)
            (mutate_lines if rng.random() < 0.7 else mutate_bytes)(folder.metrics, rng)
            assert dog._culprit()
            assert 0 <= exit_status(tmp_path, rng.random() < 0.5, []) < 256
            cells(RunState(run=run, folder=tmp_path, state="running", standing=standing_of(tmp_path)))
            assert not any(ord(c) < 32 and c not in "\n\t" for c in "".join(capsys.readouterr()))


@pytest.mark.parametrize(
    "assignment",
    [
        *(
            f"{key}={value}"
            for key in ("train.total_images", "optim.learning_rate", "model.stages.0.num_loops")
            for value in (".inf", ".nan", "9" * 400, "9" * 5000, "-1", "1e400", "2020-01-01", "!!python/name:os.system")
        ),
        "model.stages.0.num_loops=1000000000000",
        "data.workers=1000000000000",
        "model.image_size=1000000000000",
        "train.seed=" + "[" * 5000,
        "data.train_folder=&a [*a]",
    ],
    ids=lambda text: text[:50],
)
def test_impossible_numbers_in_overrides_are_refused(made: Path, ask: Ask, assignment: str) -> None:
    status, text = ask("train", made / "run" / "config.yaml", assignment, "--dry-run", "--run", made / "none")
    assert status == 2 and "error: " in text and "Traceback" not in text, text


def test_the_plan_of_the_store_is_the_one_that_was_written(made: Path) -> None:
    assert read_plan(made / "store").members[0]["mean"] == [0.5] * 3
