"""Every private name of DeepSpeed that the engine uses, one test each, on two gloo ranks at every ZeRO stage."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.runs import run_two_ranks

ROOT = Path(__file__).parents[2]
Report = dict[str, Any]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    """What both ranks noted."""
    folder = tmp_path_factory.mktemp("internals")
    run_two_ranks("tests.ranks.internals_ranks", folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


pytestmark = pytest.mark.multi_process


def test_operators_are_neither_probed_nor_built(reports: list[Report]) -> None:
    assert reports[0]["build_no_operators"] == {"deepspeed_shm_comm": False}


def test_our_optimizer_is_in_the_list_once(reports: list[Report]) -> None:
    assert reports[0]["take_under_zero"] == 1


def test_reduction_is_left_to_us_at_stage_0(reports: list[Report]) -> None:
    assert reports[0]["leave_reduction"] is False


def test_add_up_averages_over_the_ranks(reports: list[Report]) -> None:
    assert [report["add_up"] for report in reports] == [[0.5] * 3] * 2


@pytest.mark.parametrize("stage", [0, 1])
def test_there_is_no_loss_scale_but_ours(reports: list[Report], stage: int) -> None:
    assert reports[0][f"leave_loss_scaling.{stage}"] is True
    assert reports[0]["leave_loss_scaling.optimizer"] is True


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_flat_weights_and_their_gradients_have_equal_sizes(reports: list[Report], stage: int) -> None:
    for report in reports:
        sizes = report[f"sizes.{stage}"]
        assert sizes["flat"] == sizes["averaged"] and len(sizes["flat"]) > 1, sizes
        assert sizes["is_gradient_there"] and sizes["num_listed"] == sizes["num_parameters"], sizes


@pytest.mark.parametrize("stage", [1, 2])
def test_parameters_lie_end_to_end_and_fragments_cover_them(reports: list[Report], stage: int) -> None:
    first, second = (report[f"places.{stage}"] for report in reports)
    for starts, numels in zip(first["starts"], first["numels"], strict=True):
        assert starts == [sum(numels[:index]) for index in range(len(numels))]
    numels = [numel for group in first["numels"] for numel in group]
    covered = [
        sum(fragment[1] for fragment in both if fragment)
        for both in zip(first["fragments"], second["fragments"], strict=True)
    ]
    assert covered == numels


@pytest.mark.parametrize("stage", [1, 2])
def test_moments_of_every_group_are_found(reports: list[Report], stage: int) -> None:
    assert all(report[f"link_moments.{stage}"] is True for report in reports)


def test_stage_3_cuts_parameters_into_padded_equal_parts(reports: list[Report]) -> None:
    for report in reports:
        assert all(part is None and shape is None for stage in (1, 2) for part, shape in report[f"cut.{stage}"])
        for part, shape in report["cut.3"]:
            numel = 1
            for size in shape:
                numel *= size
            assert part == -(-numel // 2)


def test_no_other_file_reads_a_private_name_of_deepspeed() -> None:
    source = (ROOT / "sret_scale/train/engine/deepspeed_internals.py").read_text()
    names = {*re.findall(r"(?:optimizer|engine|mapping|parameter)\.([a-z]\w+)", source)}
    names |= {*re.findall(r'"(ds_\w+)"', source)} | {"_hp_mapping", "__compatible_ops__", "ZERO_SUPPORTED_OPTIMIZERS"}
    own = {"numel", "zero_stage", "start", "optimizer", "averaged_gradients"}  # ours, torch's, or a function here
    pattern = re.compile(r"(?<!\w)(?:\.|\")(" + "|".join(sorted(names - own)) + r")\b")
    users = {
        f"{path.relative_to(ROOT)}: {match.group(1)}"
        for path in (ROOT / "sret_scale").rglob("*.py")
        if path.name != "deepspeed_internals.py"
        for match in pattern.finditer(path.read_text())
    }
    assert users == set()
