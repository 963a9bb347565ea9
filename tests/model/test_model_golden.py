"""The model against the published code's outputs, and the anchors of the published table."""

import json
from pathlib import Path

import numpy as np
import pytest

from checks import parity
from sret_scale import cli
from sret_scale.commands.describe import accuracy
from sret_scale.model import PRESETS, describe, preset

GOLDEN = Path(__file__).parents[1] / "golden" / "sret_parity.npz"


@pytest.mark.lengthy
def test_published_outputs_are_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(GOLDEN)]) == 0
    assert "4 of 4 models agree" in capsys.readouterr().out


@pytest.mark.lengthy
def test_parity_fails_on_a_wrong_logit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with np.load(GOLDEN) as file:
        golden = {entry: file[entry] for entry in file.files if entry.startswith("sret_t_no_slice/")}
    golden["sret_t_no_slice/logits"] = golden["sret_t_no_slice/logits"] + 1e-8
    np.savez(tmp_path / "wrong.npz", **golden)
    assert parity.main([str(tmp_path / "wrong.npz")]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_parity_reports_a_file_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none.npz").write_text("text")
    assert parity.main([str(tmp_path / "none.npz")]) == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("sret_t", 4_755_979, 1.112),
        ("sret_t_no_slice", 4_755_979, 1.365),
        ("sret_lt", 4_988_024, 1.164),
        ("sret_lt_no_slice", 4_988_024, 1.417),
        ("sret_lt_16_14_1", 4_988_024, 1.224),
        ("sret_s", 20_899_692, 4.172),
        ("sret_s_no_slice", 20_899_692, 4.671),
        ("sret_t_no_slice_384", None, 6.41),
        ("sret_s_no_slice_384", None, 18.44),
        ("sret_s_no_slice_512", None, 42.67),
    ],
)
def test_published_table_is_reproduced(name: str, parameters: int | None, gmacs: float) -> None:
    counts = describe(preset(name))
    assert parameters in (None, counts["parameters"])
    digits = len(str(gmacs).partition(".")[2])
    assert round(counts["macs_published"] / 1e9, digits) == gmacs


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("sret_t_108", 8_966_715, 6_140_180_224),
        ("sret_t_167", 13_053_558, 9_308_092_160),
        ("sret_t_300", 8_250_919, 16_783_864_576),
        ("sret_t_1000", 14_178_796, 57_941_481_216),
        ("sret_t_1000_shared", 4_690_905, 57_941_481_216),
        ("sret_s_108", 23_960_456, 22_067_837_064),
        ("sret_s_300", 16_787_002, 60_469_277_400),
        ("sret_s_1000", 17_452_282, 205_113_008_520),
        ("demo_student_108", 2_103_498, 85_753_024),
        ("demo_control_20", 1_038_490, 16_267_200),
        ("demo_teacher", 2_952_370, 28_861_568),
    ],
)
def test_other_presets_have_their_expected_counts(name: str, parameters: int, macs: int) -> None:
    counts = describe(preset(name))
    assert (counts["parameters"], counts["macs"]) == (parameters, macs)


def test_describe_prints_the_three_measures_of_depth(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["describe", "sret_t_167", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["applications"], counts["residual_sublayers"], counts["weight_layers"]) == (167, 501, 1002)
    assert cli.main(["describe", "sret_t", "--image-size", "384"]) == 0
    assert "sret_t at 384 x 384" in capsys.readouterr().out
    assert cli.main(["describe", "sret_t", "--image-size", "100"]) == 2
    assert "error: stage 0: 8 groups do not divide 169 tokens" in capsys.readouterr().err


@pytest.mark.lengthy
def test_describe_alone_lists_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["describe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(PRESETS)


def test_every_deep_preset_has_the_depth_in_its_name() -> None:
    depths = {name: name.rpartition("_")[2] for name in PRESETS}
    deep = {name: int(depth) for name, depth in depths.items() if depth.isdigit() and int(depth) not in (1, 384, 512)}
    assert deep == {name: PRESETS[name].num_applications for name in deep}
    assert {108, 300, 1000} <= set(deep.values())


@pytest.mark.lengthy
def test_the_table_of_presets_in_the_documentation_is_true() -> None:
    page = (Path(__file__).parents[2] / "docs" / "model.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    table = {row[0].strip("`"): row[1:] for row in rows if len(row) == 10}
    assert list(table) == list(PRESETS)
    for name, row in table.items():
        counts, stages = describe(PRESETS[name]), PRESETS[name].stages
        assert row == [
            " ".join(str(stage.num_loops) for stage in stages),
            " ".join("-".join(map(str, stage.groups)) for stage in stages),
            stages[0].projections,
            stages[0].conditioning,
            counts["stages"][0]["branch_scheme"],
            f"{counts['parameters']:,}",
            f"{counts['macs'] / 1e9:.3f}",
            f"{counts['macs_published'] / 1e9:.3f}",
            accuracy(name),
        ], name
