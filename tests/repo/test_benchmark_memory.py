"""The memory benchmark's table for a GPU: it comes out on a CPU too, of tiny models, and ends when time is up."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from benchmarks import memory_gpu
from sret_scale.memory import plan_for
from sret_scale.memory.planning.micro_batch import BatchSearch
from sret_scale.memory.planning.step_cost import DEVICES
from sret_scale.model import SReTConfig, StageConfig

CONFIG = SReTConfig(
    image_size=16,
    num_classes=5,
    stem_strides=(2, 1, 1),
    stages=(StageConfig(width=8, num_heads=2, num_blocks=1, num_loops=6),),
)


def budget_of(config: SReTConfig, micro_batch_size: int) -> int:
    """Bytes for which the planner cannot take twice this micro-batch."""
    batches = BatchSearch(config, "bf16", DEVICES["cpu"], repeats_norms=True)
    plan = plan_for(batches, budget_bytes=2**40, micro_batch_size=1, zero_stage=0)
    return plan.state.total + memory_gpu.OUTSIDE_BYTES + batches.search(micro_batch_size).smallest_bytes()


@pytest.mark.lengthy
def test_each_choice_has_a_row_with_its_prediction() -> None:
    budget = budget_of(CONFIG, 4)
    with patch.object(memory_gpu, "ROUND_S", 0.0):
        found = list(memory_gpu.rows({"toy": CONFIG}, [budget], torch.device("cpu"), 600))
    assert [row["choice"] for row in found] == ["planner", "planner, offloaded", "half the batch", "twice the batch"]
    for row in (found[0], found[2]):
        assert row["images_per_s"] > 0 and row["steps"] == 2
        assert row["prediction_error"] == pytest.approx(0, abs=0.1)
    assert "next cheaper choice" in found[3]["left_out"]


@pytest.mark.lengthy
def test_what_the_time_does_not_allow_is_listed() -> None:
    budget = budget_of(replace(CONFIG, image_size=32), 2)
    found = list(memory_gpu.rows({"toy": CONFIG}, [budget], torch.device("cpu"), -1))
    assert len(found) == 4 and all(row["left_out"] == "time is up" for row in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what a machine without a GPU says")
def test_a_machine_without_a_gpu_is_named(tmp_path: object) -> None:
    with pytest.raises(ValueError, match="no GPU is here"):
        memory_gpu.run(tmp_path)  # type: ignore[arg-type]
