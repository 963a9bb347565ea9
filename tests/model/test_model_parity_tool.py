"""`python -m checks.parity` as a judge: it passes what agrees, and neither a NaN nor a malformed file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.plain_sret import PlainSReT
from checks import parity
from sret_scale.model import SReT, preset
from sret_scale.model.vision.official import published_names, to_published
from tests.model.typed_stages import stages_of

GOLDEN = Path(__file__).parents[1] / "golden" / "sret_parity.npz"
NAME = "sret_t_no_slice"
Entries = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def golden() -> Entries:
    """The published numbers of one model."""
    with np.load(GOLDEN) as file:
        return {entry.rpartition("/")[2]: file[entry] for entry in file.files if entry.startswith(f"{NAME}/")}


@pytest.fixture(autouse=True)
def computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that say the same of the run share one: most cases differ in what they expect of it."""
    monkeypatch.setattr(parity, "computed", _computed)


def _computed(name: str, golden: Entries) -> tuple[SReT, np.ndarray, np.ndarray]:
    inputs = ("image_size", "input_seed", "num_permutations", "state_names", "state_shapes")
    key = (name, golden["logits"].shape, *(golden[field].tobytes() for field in inputs))
    if key not in _RUNS:
        _RUNS[key] = _COMPUTED(name, golden)
    return _RUNS[key]


_COMPUTED = parity.computed
_RUNS: dict[tuple[object, ...], tuple[SReT, np.ndarray, np.ndarray]] = {}


def judge(folder: Path, entries: Entries, name: str = NAME) -> int:
    path = folder / "golden.npz"
    np.savez(path, allow_pickle=True, **{f"{name}/{field}": value for field, value in entries.items()})
    return parity.main([str(path)])


@pytest.mark.lengthy
@pytest.mark.parametrize(("field", "index"), [("loss", 0), ("logits", 1234), ("grad_norms", 0), ("grad_norms", 340)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_any_entry_fails(
    tmp_path: Path, golden: Entries, capsys: pytest.CaptureFixture[str], field: str, index: int, value: float
) -> None:
    changed = golden[field].copy()
    changed.reshape(-1)[index] = value
    assert judge(tmp_path, {**golden, field: changed}) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED") == 1 and f"{value}" in out and "0 of 1 models agree" in out


def test_nan_on_both_sides_fails() -> None:
    assert np.isnan(parity.largest_difference("loss", np.array(np.nan), np.array(np.nan)))


def test_difference_of_a_norm_above_one_is_absolute(
    tmp_path: Path, golden: Entries, capsys: pytest.CaptureFixture[str]
) -> None:
    norms = golden["grad_norms"].copy()
    largest = int(norms.argmax())
    assert norms[largest] > 5
    norms[largest] += 2e-9
    assert judge(tmp_path, {**golden, "grad_norms": norms}) == 1
    assert "2.0e-09   FAILED" in capsys.readouterr().out


MALFORMED: list[tuple[str, Callable[[np.ndarray], np.ndarray] | None, str]] = [
    ("grad_norms", None, "the file lacks sret_t_no_slice/grad_norms"),
    ("image_size", None, "the file lacks sret_t_no_slice/image_size"),
    ("image_size", lambda _: np.array(7), "ValueError"),
    ("image_size", lambda _: np.array(np.inf), "OverflowError"),
    ("logits", lambda a: a[0], "IndexError"),
    ("logits", lambda a: a[:1], "golden logits are float64[1, 1000], expected float64[2, 1000]"),
    ("logits", lambda a: a[:, :10], "shape of head.weight differs"),
    ("loss", lambda a: np.array([a, a]), "golden loss are float64[2]"),
    ("grad_norms", lambda a: a[1:], "golden grad_norms are float64[340], expected float64[341]"),
    ("grad_norms", lambda a: a.astype(str), "golden grad_norms are <U"),
    ("grad_names", lambda a: a[1:], "golden lacks ['head.bias']"),
    ("grad_names", lambda a: np.append(a[1:], "nobody"), "we lack ['nobody']"),
    ("state_names", lambda a: np.append(a[1:], "nobody"), "state-dict keys differ"),
    ("state_shapes", lambda a: a[1:], "ValueError"),
    ("state_shapes", lambda a: np.char.replace(a, "32", "thirty"), "ValueError"),
    ("num_permutations", lambda _: np.array(3), "drew 0 permutations, golden 3"),
    ("input_seed", lambda _: np.array(-1), "ValueError"),
]


@pytest.mark.lengthy
@pytest.mark.parametrize(("field", "change", "message"), MALFORMED)
def test_malformed_entry_is_one_line_and_fails(
    tmp_path: Path,
    golden: Entries,
    capsys: pytest.CaptureFixture[str],
    field: str,
    change: Callable[[np.ndarray], np.ndarray] | None,
    message: str,
) -> None:
    entries = {key: value for key, value in golden.items() if key != field}
    if change is not None:
        entries[field] = change(golden[field])
    assert judge(tmp_path, entries) == 1
    _, line, last = capsys.readouterr().out.splitlines()
    assert "FAILED: " in line and message in line
    assert last == "0 of 1 models agree"


def test_parameter_without_gradient_is_named(golden: Entries) -> None:
    model = SReT(preset(NAME))
    with pytest.raises(ValueError, match=r"the loss gives head\.bias no gradient"):
        parity.gradient_norms(model, golden)


@pytest.mark.parametrize("content", ["nothing", "text", "array", "pickle", "empty", "half", "flipped"])
def test_file_that_cannot_be_read_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    path = tmp_path / "file.npz"
    whole = GOLDEN.read_bytes()
    if content == "text":
        path.write_text("text")
    elif content == "array":
        with path.open("wb") as stream:
            np.save(stream, np.zeros(3))
    elif content == "pickle":
        np.savez(path, allow_pickle=True, **{f"{NAME}/logits": np.array([{}], dtype=object)})
    elif content == "empty":
        np.savez(path)
    elif content == "half":
        path.write_bytes(whole[: len(whole) // 2])
    elif content == "flipped":
        path.write_bytes(whole[:5000] + bytes(byte ^ 255 for byte in whole[5000:5100]) + whole[5100:])
    assert parity.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot read golden outputs from {path}") and error.count("\n") == 1


def golden_of_the_twin(name: str, image_size: int) -> Entries:
    """What the file would say of a preset, by the plain twin; num_classes 1000 as in the published ones."""
    model = SReT(preset(name, image_size=image_size, num_classes=1000)).double().eval()
    published = to_published(model.config, model.state_dict())
    names = published_names(model.config)
    entries: Entries = {
        "state_names": np.array(list(published)),
        "state_shapes": np.array(["x".join(map(str, tensor.shape)) for tensor in published.values()]),
        "input_seed": np.array(11),
        "image_size": np.array(image_size),
        "logits": np.zeros((2, 1000)),
    }
    model = parity.golden_model(name, entries)
    draw = parity.GoldenPermutations()
    for stage in stages_of(model):
        stage.permutations = draw
    images = np.random.RandomState(11).standard_normal((2, 3, image_size, image_size))
    logits = PlainSReT(model)(torch.from_numpy(images))
    loss = F.cross_entropy(logits, torch.tensor(parity.LABELS))
    loss.backward()
    first_names = {ours: theirs for theirs, ours in reversed(names.items())}
    norms = {first_names[ours]: float(p.grad.norm()) for ours, p in model.named_parameters()}
    return {
        **entries,
        "logits": logits.detach().numpy(),
        "loss": loss.detach().numpy(),
        "grad_names": np.array(list(norms)),
        "grad_norms": np.array(list(norms.values())),
        "num_permutations": np.array(draw.drawn),
    }


@pytest.mark.lengthy
def test_384_pixel_preset_goes_through_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = golden_of_the_twin("sret_t_384", 384)
    assert entries["num_permutations"] > 0
    assert "1x64x48x48" in entries["state_shapes"]
    assert judge(tmp_path, entries, "sret_t_384") == 0
    assert "1 of 1 models agree" in capsys.readouterr().out
