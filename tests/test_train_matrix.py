"""The engine's parity matrix: every way of computing trains the parameters of a plain PyTorch loop.

All pairs of values by default, the full product of 768 cells as `slow`. Ranks are started once for all of their cells.
"""

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.matrix import Cell, all_cells, make_model, pairs_of, pairwise_cells, plain_loop
from tests.runs import run_ranks

# Two minutes on two idle cores; a busy machine may take ten times as long.
pytestmark = [pytest.mark.multi_process, pytest.mark.timeout(1800)]
CHOSEN = pairwise_cells()


def test_the_chosen_cells_cover_every_pair_of_values() -> None:
    assert set().union(*map(pairs_of, CHOSEN)) == set().union(*map(pairs_of, all_cells()))
    assert len(CHOSEN) <= 16


def train(folder: Path, cells: list[Cell]) -> Path:
    for world_size in (1, 2):
        names = [cell.name for cell in cells if cell.world_size == world_size]
        run_ranks(world_size, "tests.matrix", folder, *names, timeout_s=90 * len(names))
    return folder


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("matrix"), CHOSEN)


@functools.cache
def expected(precision: str, accumulation: str, clipping: bool) -> dict[str, Tensor]:
    return plain_loop(precision, accumulation, clipping=clipping)


def check(folder: Path, cell: Cell) -> None:
    got = load_file(folder / f"{cell.name}.safetensors")
    plain = expected(cell.precision, cell.accumulation, cell.clipping)
    start = make_model().state_dict()
    names = [name for name in plain if cell.ema or not name.startswith("ema.")]
    assert sorted(got) == sorted(names)
    moved = sum(float((plain[name] - start[name]).square().sum()) for name in start)
    apart = sum(float((got[name] - plain[name]).square().sum()) for name in start)
    largest = max(float((got[name] - plain[name]).abs().max()) for name in names)
    print(f"{cell.name}: largest difference {largest:.1e}, L2 {(apart / moved) ** 0.5:.1e} of the way")
    if cell.precision == "fp32":
        assert largest <= 1e-6
    else:
        # A batch cut over ranks rounds other sums to bf16, and Adam gives small gradients full steps (seen: 2.5 %).
        assert apart <= 0.05**2 * moved
    if cell.world_size == 1 and cell.precision == "fp32" and not cell.clipping:
        # Nothing is summed in another order: recomputation, ZeRO and accumulation change no bit.
        assert [name for name in names if not torch.equal(got[name], plain[name])] == []


@pytest.mark.parametrize("cell", CHOSEN, ids=lambda cell: cell.name)
def test_a_cell_trains_the_parameters_of_a_plain_loop(chosen: Path, cell: Cell) -> None:
    check(chosen, cell)


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_the_full_product_trains_the_parameters_of_a_plain_loop(tmp_path: Path) -> None:
    train(tmp_path, all_cells())
    failed = []
    for cell in all_cells():
        try:
            check(tmp_path, cell)
        except AssertionError as error:
            failed.append(f"{cell.name}: {error}")
    assert failed == []
