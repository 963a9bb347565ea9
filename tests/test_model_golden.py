"""The model against the published code's outputs, and the anchors of the published table."""

from pathlib import Path

import numpy as np
import pytest

from sret_scale.model import PRESETS, describe, preset
from tests import parity

GOLDEN = Path(__file__).parent / "golden" / "sret_parity.npz"


def test_published_outputs_are_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(GOLDEN)]) == 0
    assert "4 of 4 models agree" in capsys.readouterr().out


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


def test_every_deep_preset_has_the_depth_in_its_name() -> None:
    for name, config in PRESETS.items():
        count = name.rpartition("_")[2]
        if count.isdigit() and int(count) not in (1, 384, 512):
            assert config.num_applications == int(count), name
