"""The model's benchmarks: what of the GPU table runs on a CPU, and the count of compiled graphs."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import model as benchmark
from benchmarks.captured import TrainingStep
from benchmarks.compile import first_and_steady
from benchmarks.gpu import OUT_OF_MEMORY, Cell, Gate, measured, moved_bytes, ordered_cells, smoke_config, table
from benchmarks.model import over_published
from benchmarks.published import published_twin
from sret_scale.model import Noise, SReT, preset

CPU = torch.device("cpu")
CELLS = ordered_cells({"tiny": smoke_config()}, [2, 16, 256])


class Clock:
    """Seconds that pass only when a measurement says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def skips(rows: list[dict[str, Any]]) -> list[str]:
    return [row["skipped"] for row in rows if "skipped" in row]


def test_cells_come_once_and_the_aims_first() -> None:
    keys = [tuple(cell.key.values()) for cell in CELLS]
    assert keys[:4] == [("tiny", True, 256), ("tiny", True, 16), ("tiny", False, 256), ("tiny", False, 16)]
    assert sorted(keys) == [("tiny", padded, batch) for padded in (False, True) for batch in (2, 16, 256)]


def test_the_time_limit_is_never_passed_and_everything_left_out_is_listed() -> None:
    clock = Clock()

    def measure(cell: Cell, mode: str) -> dict[str, Any]:
        clock.now += 10
        return {"loss": 1.0}

    rows = [row for _, row in table(CELLS, ["eager", "graph"], measure, Gate(45.0, clock))]
    assert clock.now == 40
    assert len(rows) == 12 and skips(rows) == ["would pass the time limit of 45 s"] * 8


def test_a_batch_above_one_that_ran_out_of_memory_is_not_tried() -> None:
    tried = []

    def measure(cell: Cell, mode: str) -> dict[str, Any]:
        tried.append((cell.config.padded, cell.batch))
        return {"skipped": OUT_OF_MEMORY} if cell.batch >= 16 else {}

    cells = sorted(CELLS, key=lambda cell: cell.batch)
    rows = [row for _, row in table(cells, ["graph"], measure, Gate(math.inf, Clock()))]
    assert (False, 256) not in tried and (True, 256) not in tried and len(tried) == 4
    assert skips(rows).count("memory ran out at micro-batch 16") == 2


def test_memory_that_runs_out_in_a_capture_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_off(*args: object) -> dict[str, Any]:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr("benchmarks.gpu._measured", broken_off)
    assert measured(CELLS[0], "graph", CPU) == {"skipped": OUT_OF_MEMORY}


def test_another_error_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object) -> dict[str, Any]:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("benchmarks.gpu._measured", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        measured(CELLS[0], "graph", CPU)


def test_a_mode_that_computes_something_else_is_an_error() -> None:
    def measure(cell: Cell, mode: str) -> dict[str, Any]:
        return {"loss": {"eager": 1.6, "graph": math.nan}[mode]}

    with pytest.raises(RuntimeError, match="computed something else"):
        list(table(CELLS, ["eager", "graph"], measure, Gate(math.inf, Clock())))


def test_a_captured_step_gets_its_permutations_at_a_fixed_address() -> None:
    config = smoke_config()
    torch.manual_seed(0)
    step = TrainingStep(model := SReT(config), model, 2, CPU)
    addresses = [[id(value.table), value.table.data_ptr()] for value in step.tables]
    losses = []
    for number in (1, 2, 1):
        step.refill(number)
        step.run()
        losses.append(step.loss.clone())
    assert addresses == [[id(value.table), value.table.data_ptr()] for value in step.tables]
    torch.manual_seed(0)
    plain = SReT(config).train()
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        expected = F.cross_entropy(plain(step.images_BCHW, Noise(1, 1)).float(), step.labels_B)
    assert torch.equal(losses[0], expected.detach()) and torch.equal(losses[2], losses[0])
    assert not torch.equal(losses[1], losses[0])
    with pytest.raises(ValueError, match="drop_path and dropout must be 0"):
        TrainingStep(model := SReT(replace(config, drop_path=0.1)), model, 2, CPU)


@pytest.mark.lengthy
def test_twin_and_padding_give_the_loss_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.ROUND_S", 0.0)
    plain, padded = (Cell("tiny", replace(smoke_config(), padded=padded), 2) for padded in (False, True))
    losses = [measured(plain, mode, CPU)["loss"] for mode in ("eager", "twin")]
    losses.append(measured(padded, "eager", CPU)["loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=0.01)


@pytest.mark.parametrize(("name", "megabytes"), [("sret_t", 182), ("sret_s", 370)])
def test_moved_bytes_are_those_of_the_paper_estimate(name: str, megabytes: int) -> None:
    """182 and 370 MB an image at 20 applications and large batches were worked out apart from this model of them."""
    assert moved_bytes(preset(name, padded=True), 256) / 256e6 == pytest.approx(megabytes, rel=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["model", "--device", "cuda"])
    with pytest.raises(SystemExit) as stop:
        benchmark.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: --device cuda needs a GPU")


@pytest.mark.lengthy
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_table_runs_on_a_cpu_at_a_tiny_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    monkeypatch.setattr(sys, "argv", ["model", "--smoke", "--backend", "eager", "--out", str(out)])
    monkeypatch.setattr("benchmarks.gpu.SMOKE_BATCHES", [2])
    monkeypatch.setattr("benchmarks.gpu.ROUND_S", 0.0)
    benchmark.main()
    rows = json.loads(out.read_text())["rows"]
    assert [(row["mode"], row["padded"]) for row in rows if "skipped" not in row] == [
        ("eager", True),
        ("compiled", True),
        ("eager", False),
        ("twin", False),
        ("compiled", False),
    ]
    assert all(row["images_per_s"] > 0 and row["mfu"] > 0 for row in rows if "skipped" not in row)


@pytest.mark.lengthy
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_graphs_are_counted_and_later_steps_add_none() -> None:
    torch._dynamo.reset()
    row = first_and_steady(smoke_config(), batch=2, repeats=1, backend="eager")
    # Blocks with 4, 2 and 1 groups, and a projection in each stage.
    assert (row["graphs"], row["graphs_of_later_steps"], row["applications"]) == (5, 0, 4)
    torch._dynamo.reset()


def test_the_published_code_runs_with_the_weights_of_ours_where_a_checkout_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SRET_PUBLISHED", str(tmp_path))
    model = SReT(preset("sret_t"))
    with pytest.raises(FileNotFoundError, match=r"SRET_PUBLISHED=.*expected a checkout of SReT with the file SReT\.py"):
        published_twin("sret_t", model)
    # What it asks of timm, in its place as of timm 0.3, and what is asked of it.
    lines = [
        "from timm.models.layers import DropPath, to_2tuple, trunc_normal_",
        "from timm.models.registry import register_model",
        "class SReT_T:",
        "    def __init__(self, num_classes): self.num_classes = num_classes",
        "    def load_state_dict(self, state): self.names = sorted(state)",
    ]
    (tmp_path / "SReT.py").write_text("\n".join(lines))
    theirs: Any = published_twin("sret_t", model)
    assert theirs.num_classes == 1000 and "pos_embed" in theirs.names
    assert published_twin("sret_t_108", model) is None
    monkeypatch.delenv("SRET_PUBLISHED")
    assert published_twin("sret_t", model) is None
    assert over_published({"model": 2.0, "twin": 3.0}) == {}
    assert over_published({"model": 2.0, "published": 3.0, "compiled": 1.0}) == {"model": 1.5, "compiled": 3.0}
