"""The scaling page says what its formulas and the measured bytes give."""

import json
import re

import pytest

from benchmarks.scaling import GPUS, JOBS, NETWORKS, RESULT, communication_s, efficiency, sent_bytes, table
from tests.tiny import ROOT

PAGE = (ROOT / "docs" / "scaling.md").read_text()
STEPS = json.loads(RESULT.read_text())["steps"]


def test_the_tables_of_the_page_are_those_of_the_measured_bytes() -> None:
    for stage in ("zero0", "zero1"):
        assert table(STEPS[stage]["sent_bytes_per_parameter"]) in PAGE


@pytest.mark.parametrize(
    ("name", "key"), [("PyTorch DDP", "ddp"), *((f"ZeRO {stage}", f"zero{stage}") for stage in range(4))]
)
def test_the_bytes_of_the_page_are_the_measured_ones(name: str, key: str) -> None:
    row = re.search(rf"^\| {name} \| ([0-9.]+) \|", PAGE, re.M)
    assert row and float(row[1]) == round(STEPS[key]["sent_bytes_per_parameter"], 2)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_the_formulas_give_the_measurement_at_two_ranks_and_fall_with_more(job: object) -> None:
    assert sent_bytes(4.0, 100.0, 2) == 400.0
    assert sent_bytes(4.0, 100.0, 1) == 0.0 == communication_s(0.0, 1, NETWORKS[0])
    for network in NETWORKS:
        values = [efficiency(job, 4.0, count, network) for count in GPUS]  # type: ignore[arg-type]
        assert values == sorted(values, reverse=True) and values[-1] > 0 and values[0] < 1
