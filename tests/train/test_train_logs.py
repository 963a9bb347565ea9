"""What a run of two ranks that was killed and continued writes: each line once, in text, metrics and trackers."""

import importlib.util
import json
import re
import struct
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sret_scale.train.telemetry.trackers import numbers_of
from tests.forked import sret_scale_forked
from tests.runs import complete_lines, rank_processes, wait_for_images
from tests.tiny import CANARY, NUM_IMAGES, sret_scale, tiny_config, tiny_shards, write_config

pytestmark = pytest.mark.multi_process

TRACKER = """
import contextlib, json

@contextlib.contextmanager
def track(folder):
    with (folder / "mine.jsonl").open("a") as stream:
        yield lambda record: print(json.dumps(record), file=stream, flush=True)
        print('{"kind": "end"}', file=stream)
"""


@dataclass(frozen=True)
class Continued:
    """A finished run whose first start was killed; `out` is what the second start printed."""

    run: Path
    out: str
    lines: list[dict[str, Any]]

    @property
    def restart(self) -> int:
        """Place of the only restart line among the metrics."""
        (place,) = (place for place, line in enumerate(self.lines) if line["kind"] == "restart")
        return place


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> Continued:
    folder = tmp_path_factory.mktemp("logs")
    config = tiny_config(tiny_shards(folder / "shards"))
    file = write_config(folder / "tiny.yaml", config, total_images=256, eval_interval_images=128)
    (folder / "my_tracker.py").write_text(TRACKER)
    names = ["tensorboard", "my_tracker:track", *(["wandb"] if importlib.util.find_spec("wandb") else [])]
    # In the folder of a sweep.
    run = folder / "depth" / "run"
    (folder / "depth" / ".sweep").mkdir(parents=True)
    command = ("train", file, f"train.trackers=[{','.join(names)}]", "--run", run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        process = sret_scale(*command, cwd=folder)
        wait_for_images(run, 96, process)
        main_rank = next(rank for rank in rank_processes(process) if rank.environ()["RANK"] == "0")
        main_rank.kill()
        _, error = process.communicate(timeout=120)
        assert process.returncode != 0, error
        ended = sret_scale_forked(*command, cwd=folder)
    assert ended.returncode == 0, ended
    return Continued(run, ended.stdout, complete_lines(run / "metrics.jsonl"))


def test_each_accuracy_is_printed_once(continued: Continued) -> None:
    printed = [line for line in continued.out.splitlines() if "top-1" in line]
    evaluated = [line for line in continued.lines[continued.restart :] if line["kind"] == "eval"]
    texts = {place: f"top-1 {line['top1']:.2%} ({line['weights']} weights" for place, line in enumerate(evaluated)}
    assert printed == [
        f"run: {line['images']:,} images: {texts[place]}, {NUM_IMAGES} test images)"
        for place, line in enumerate(evaluated)
    ]
    assert {(line["images"], line["weights"]) for line in evaluated} >= {(256, "ema"), (256, "raw")}
    assert max(Counter(printed).values()) == 1


def test_progress_is_printed_by_one_rank_with_loss_rate_and_remaining_time(continued: Continued) -> None:
    last = [line for line in continued.out.splitlines() if line.startswith("run: 256 of 256 images")]
    assert len(last) == 1
    assert re.fullmatch(r"run: 256 of 256 images  loss \d+\.\d{4}  [\d,]+ images/s  0:00 left", last[0])
    assert "\x1b" not in continued.out


def test_a_killed_and_continued_run_has_one_restart_line(continued: Continued) -> None:
    restart = continued.lines[continued.restart]
    assert restart["from_step"] * 32 == restart["images"] <= continued.lines[continued.restart - 1]["images"]
    steps = [line["step"] for line in continued.lines[continued.restart :] if line["kind"] == "train"]
    assert steps == list(range(restart["from_step"] + 1, 9))
    # The clock adds up the starts, and stands where the checkpoint was made.
    times = [line["time_s"] for line in continued.lines[continued.restart :]]
    assert times == sorted(times)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's protobuf files
def test_tensorboard_holds_the_numbers_of_the_metrics(continued: Continued) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first, second = sorted((continued.run / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime)
    assert first.stat().st_size > 0
    # Of the killed start TensorBoard may lack the last minutes, which its writer had not flushed; of the other nothing.
    events = reading.EventAccumulator(str(second), size_guidance={reading.SCALARS: 0})
    events.Reload()
    found = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()[reading.SCALARS]
    }
    expected: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in continued.lines[continued.restart :]:
        for name, value in numbers_of(line).items():
            expected[name].append((line["images"], value))
    assert found.keys() == expected.keys()
    assert {"train/loss", "train/lr", "eval/ema/top1", "eval/raw/top1", "memory/peak_rss_bytes"} <= found.keys()
    for tag, points in expected.items():
        assert [images for images, _ in found[tag]] == [images for images, _ in points]
        # Event files hold float32.
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in points], rel=1e-6)


def test_a_tracker_of_the_users_gets_every_record_once(continued: Continued) -> None:
    mine = complete_lines(continued.run / "mine.jsonl")
    assert mine.pop()["kind"] == "end"
    # The kill may have come between the file and the tracker.
    assert mine in (continued.lines, continued.lines[: continued.restart - 1] + continued.lines[continued.restart :])


def test_wandb_has_both_starts_as_one_run_of_the_sweeps_group(continued: Continued) -> None:
    pytest.importorskip("wandb")
    files = sorted((continued.run / "wandb").glob("offline-run-*/*.wandb"))
    identity = (continued.run / "wandb" / "id").read_text()
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    # Of a killed start W&B may lack what it had not written out.
    records = _wandb_records(files[1])
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.run_group, run.display_name) == (identity, "depth", "run")
    written = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert written["train"]["total_images"] == 256
    found = [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    found = [{name: value for name, value in one.items() if not name.startswith("_")} for one in found]
    assert found == [{"images": line["images"], **numbers_of(line)} for line in continued.lines[continued.restart :]]
    assert [file for file in continued.run.rglob("*") if file.is_file() and CANARY.encode() in file.read_bytes()] == []


def _wandb_records(file: Path) -> list[Any]:
    """The records of an offline run: a log of LevelDB's format (blocks of 32 KiB) behind seven bytes."""
    schema: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")

    raw, place, body, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(raw):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, length, part = struct.unpack("<IHB", raw[place : place + 7])
        body += raw[place + 7 : place + 7 + length]
        place += 7 + length
        # Whole, first, middle, last.
        if part in (1, 4):
            found.append(schema.Record.FromString(body))
            body = b""
    return found
