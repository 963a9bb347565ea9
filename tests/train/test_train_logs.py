"""What a run of two ranks that was killed and continued writes: each line once, in text, metrics and TensorBoard."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sret_scale.runs.run_folder import scalars
from tests.forked import sret_scale_forked
from tests.runs import complete_lines, rank_processes, wait_for_images
from tests.tiny import NUM_IMAGES, sret_scale, tiny_config, tiny_shards, write_config

pytestmark = pytest.mark.multi_process


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
    file = write_config(folder / "tiny.yaml", config, total_images=256, eval_interval_images=128, tensorboard=True)
    run = folder / "run"
    process = sret_scale("train", file, "--run", run, cwd=folder)
    wait_for_images(run, 96, process)
    main_rank = next(rank for rank in rank_processes(process) if rank.environ()["RANK"] == "0")
    main_rank.kill()
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0, error
    ended = sret_scale_forked("train", file, "--run", run, cwd=folder)
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
        prefix = f"{line['kind']}/{line['weights']}" if "weights" in line else line["kind"]
        for name, value in scalars(line):
            if name != "images":
                expected[f"{prefix}/{name}"].append((line["images"], value))
    assert found.keys() == expected.keys()
    assert {"train/loss", "train/lr", "eval/ema/top1", "eval/raw/top1", "memory/peak_rss_bytes"} <= found.keys()
    for tag, points in expected.items():
        assert [images for images, _ in found[tag]] == [images for images, _ in points]
        # Event files hold float32.
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in points], rel=1e-6)
