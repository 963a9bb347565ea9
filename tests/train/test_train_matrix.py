"""The engine's parity matrix: every way of computing trains the parameters of a plain PyTorch loop.

All pairs of values by default, the full product of 768 cells as `slow`, which `python -m checks.product` runs in pieces
and with a table. Ranks are started once for all of their cells.
"""

import dataclasses
import math
from pathlib import Path

import pytest
from torch import Tensor

from checks.matrix import Cell, all_cells, compare, pairs_of, pairwise_cells, plain_loop
from checks.product import Line, prepare, read_lines, run_product, table
from tests.runs import run_ranks

# Two minutes on two idle cores; a busy machine may take ten times as long.
pytestmark = [pytest.mark.multi_process, pytest.mark.timeout(1800)]
CHOSEN = pairwise_cells()


def test_the_chosen_cells_cover_every_pair_of_values() -> None:
    assert set().union(*map(pairs_of, CHOSEN)) == set().union(*map(pairs_of, all_cells()))
    assert len(CHOSEN) <= 16


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Line]:
    folder = tmp_path_factory.mktemp("matrix")
    for world_size in (1, 2):
        cells = [cell for cell in CHOSEN if cell.world_size == world_size]
        run_ranks(world_size, "checks.matrix", prepare(folder, cells) / "task", timeout_s=90 * len(cells))
    return read_lines(folder)


@pytest.mark.parametrize("cell", CHOSEN, ids=lambda cell: cell.name)
def test_a_cell_trains_the_parameters_of_a_plain_loop(chosen: dict[str, Line], cell: Cell) -> None:
    print(chosen[cell.name])
    assert chosen[cell.name]["problem"] == ""


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return plain_loop("fp32", "1", clipping=False)


@pytest.mark.parametrize(
    ("world_size", "precision", "change", "problem"),
    [
        (1, "fp32", 0.0, ""),
        (1, "fp32", 1e-7, "other bits: 1 tensors, first head.weight"),
        (2, "fp32", 1e-7, ""),
        (2, "fp32", 2e-6, "further apart than 1e-6"),
        (2, "fp32", math.nan, "further apart than 1e-6"),
        (2, "bf16", 1e-3, ""),
        (2, "bf16", 0.1, "further apart than 5 % of the way"),
        (2, "bf16", math.nan, "further apart than 5 % of the way"),
    ],
)
def test_what_is_too_far_from_the_plain_loop_does_not_hold(
    plain: dict[str, Tensor], world_size: int, precision: str, change: float, problem: str
) -> None:
    cell = dataclasses.replace(CHOSEN[0], world_size=world_size, precision=precision, clipping=False, ema=True)
    got = {name: value.clone() for name, value in plain.items()}
    got["head.weight"][0, 0] += change
    assert compare(cell, got, plain).problem == problem
    del got["head.weight"]
    assert compare(cell, got, plain).problem == "other names than the plain loop's"


def test_the_table_counts_what_was_run_and_names_what_does_not_hold() -> None:
    held, failed = (
        {"cell": cell.name, "largest": 1e-8, "share": 0.0, "problem": problem, "cpu_s": 2.0}
        for cell, problem in zip(all_cells(), ("", "broken"), strict=False)
    )
    first, *_, last = table([held, failed]).splitlines()[1:]
    assert first.split()[:4] == ["all", "768", "2", "1"]
    assert last == f"does not hold: {failed['cell']}: broken"


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_the_full_product_trains_the_parameters_of_a_plain_loop(tmp_path: Path) -> None:
    lines = run_product(tmp_path, seconds=math.inf)
    print(table(lines))
    assert sorted(line["cell"] for line in lines) == sorted(cell.name for cell in all_cells())
    assert [line for line in lines if line["problem"]] == []
