"""A teacher answers in its own preprocessing, leaves the student alone, and is checked before it is used."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_scale.distill import OnlineTeacher, Teacher, build_teacher
from sret_scale.distill.footprint import teacher_bytes
from sret_scale.model import SReT, SReTConfig, StageConfig

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def tiny_network(classes: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, classes)
    )


def twelve_pixels() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    return tiny_network(seed=1), MEAN, STD, 12


def one_channel() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    torch.manual_seed(4)
    return nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten(), nn.Linear(3, 4)), (0.4,), (0.2,), 8


def eight_pixels() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    return tiny_network(seed=2), (0.5,) * 3, (0.5,) * 3, 8


def nan_logits() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    network = tiny_network()
    with torch.no_grad():
        network[0].weight[0, 0, 0, 0] = float("nan")
    return network, MEAN, STD, 8


def feature_map() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    return nn.Conv2d(3, 4, 3), MEAN, STD, 8


def features_and_logits() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x.flatten(1)

    return Both(), MEAN, STD, 8


def wrong_width() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    return nn.Sequential(nn.Flatten(), nn.Linear(7, 4)), MEAN, STD, 8


def only_a_module() -> nn.Module:
    return tiny_network()


def no_runs(folder: Path) -> Any:
    raise FileNotFoundError(f"{folder} is no run folder")


def build(spec: str, num_classes: int = 4, **options: Any) -> Teacher:
    return build_teacher(spec, num_classes=num_classes, device="cpu", load_run=no_runs, **options)


def here(function: str) -> str:
    return f"module:{__name__}:{function}"


def unit_batch(batch: int = 5, size: int = 16) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(3))


def expected_logits(parts: tuple[nn.Module, tuple[float, ...], tuple[float, ...], int], unit: Tensor) -> Tensor:
    module, mean, std, size = parts
    resized = F.interpolate(unit, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    normalised = torch.stack([(resized[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    with torch.no_grad():
        return module.eval()(normalised)


def test_teacher_resizes_and_normalises_as_it_was_trained() -> None:
    unit = unit_batch()
    logits = build(here("twelve_pixels"))(unit)
    assert logits.shape == (5, 4) and logits.dtype == torch.float32 and not logits.requires_grad
    torch.testing.assert_close(logits, expected_logits(twelve_pixels(), unit), atol=1e-5, rtol=1e-5)


def test_a_spec_may_say_what_its_images_are() -> None:
    unit, (module, *_) = unit_batch(), twelve_pixels()
    teacher = build(here("twelve_pixels") + "?size=8&mean=0.5&std=0.2,0.3,0.4")
    expected = expected_logits((module, (0.5,) * 3, (0.2, 0.3, 0.4), 8), unit)
    torch.testing.assert_close(teacher(unit), expected, atol=1e-5, rtol=1e-5)
    assert teacher.describe()["image_size"] == 8 and teacher.describe()["std"] == [0.2, 0.3, 0.4]


def test_a_teacher_of_grey_images_gets_grey_ones() -> None:
    unit = unit_batch(size=8)
    grey = (0.299 * unit[:, 0] + 0.587 * unit[:, 1] + 0.114 * unit[:, 2])[:, None]
    with torch.no_grad():
        expected = one_channel()[0].eval()((grey - 0.4) / 0.2)
    torch.testing.assert_close(build(here("one_channel"))(unit), expected, atol=1e-5, rtol=1e-5)


def test_a_timm_network_may_have_one_channel_and_another_size(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(5)
    network = timm.create_model("test_resnet", in_chans=1, num_classes=4)
    torch.save(network.state_dict(), tmp_path / "grey.pt")
    spec = f"timm:test_resnet?checkpoint={tmp_path / 'grey.pt'}&channels=1&size=32&mean=0.5&std=0.25"
    unit = unit_batch(size=32)
    grey = (0.299 * unit[:, 0] + 0.587 * unit[:, 1] + 0.114 * unit[:, 2])[:, None]
    with torch.no_grad():
        expected = network.eval()((grey - 0.5) / 0.25)
    torch.testing.assert_close(build(spec)(unit), expected, atol=1e-4, rtol=1e-4)
    bytes_of = functools.partial(
        teacher_bytes, num_classes=4, micro_batch_size=2, precision="fp32", untrained_run=no_runs
    )
    assert bytes_of(spec).weights == sum(tensor.nbytes for tensor in network.state_dict().values())
    assert bytes_of(spec.replace("size=32", "size=64")).forward > 3 * bytes_of(spec).forward


def test_micro_batches_give_the_same_logits() -> None:
    unit = unit_batch(7)
    torch.testing.assert_close(
        build(here("twelve_pixels"), micro_batch_size=3)(unit), build(here("twelve_pixels"))(unit)
    )


def test_joined_teachers_average_probabilities_each_at_its_own_size() -> None:
    unit = unit_batch()
    members = [build(here(name))(unit).softmax(-1) for name in ("twelve_pixels", "eight_pixels")]
    joined = build(f"{here('twelve_pixels')}+{here('eight_pixels')}")(unit)
    torch.testing.assert_close(joined.exp(), (members[0] + members[1]) / 2)


def test_run_comes_from_the_callable_that_is_passed_in() -> None:
    asked = []

    def load_run(folder: Path) -> Any:
        asked.append(folder)
        return twelve_pixels()

    teacher = build_teacher("run:runs/a+b", num_classes=4, device="cpu", load_run=load_run)
    assert asked == [Path("runs/a+b")]
    assert teacher(unit_batch()).shape == (5, 4)


def test_student_gets_gradients_and_the_teacher_stays_outside_of_it() -> None:
    student = nn.Linear(4, 4)
    student.teacher = build(here("twelve_pixels"))  # type: ignore[assignment]
    assert [name for name, _ in student.named_parameters()] == ["weight", "bias"]
    assert list(student.state_dict()) == ["weight", "bias"]
    logits = student.teacher(unit_batch())
    loss = F.kl_div(student(torch.ones(5, 4)).log_softmax(-1), logits.softmax(-1), reduction="batchmean")
    assert torch.autograd.grad(loss, student.weight)[0].abs().sum() > 0


def test_convolutions_compute_channels_last() -> None:
    teacher = build(here("twelve_pixels"))
    assert isinstance(teacher, OnlineTeacher) and isinstance(teacher.module, nn.Sequential)
    convolution = teacher.module[0]
    assert isinstance(convolution, nn.Conv2d)
    seen: list[Tensor] = []
    convolution.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    teacher(unit_batch())
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (*seen, convolution.weight))


def test_description_identifies_weights_and_preprocessing() -> None:
    first, again, other = (build(here(name)).describe() for name in ("twelve_pixels", "twelve_pixels", "eight_pixels"))
    assert first == again == json.loads(json.dumps(first))
    assert first["image_size"] == 12 and first["mean"] == list(MEAN)
    assert first["weights_sha256"] != other["weights_sha256"]
    joined = build(f"{here('twelve_pixels')}+{here('eight_pixels')}").describe()
    assert joined == {"members": [first, other]}


def test_batch_norm_does_not_learn_from_the_batches() -> None:
    teacher = build(here("twelve_pixels"))
    unit = unit_batch()
    first = teacher(unit)
    teacher(unit * 0.1)
    assert torch.equal(first, teacher(unit))


def test_bf16_keeps_norms_in_fp32_and_is_near_fp32() -> None:
    unit = unit_batch()
    teacher = build(here("twelve_pixels"), precision="bf16")
    dtypes = {name: parameter.dtype for name, parameter in teacher._module.named_parameters()}
    assert dtypes["0.weight"] == torch.bfloat16 and dtypes["1.weight"] == torch.float32
    logits = teacher(unit)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, build(here("twelve_pixels"))(unit), atol=0.05, rtol=0.05)


def recursive() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    stage = StageConfig(width=16, num_heads=2, num_blocks=1, num_loops=3)
    config = SReTConfig(stages=(stage,), image_size=32, num_classes=4)
    torch.manual_seed(0)
    return SReT(config), MEAN, STD, 32


def test_one_of_our_models_teaches_in_bf16() -> None:
    unit = unit_batch(3, 32)
    torch.testing.assert_close(
        build(here("recursive"), precision="bf16")(unit), build(here("recursive"))(unit), atol=0.05, rtol=0.05
    )


def test_compiled_teacher_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced with the eager backend: what is tested is that nothing breaks the graph, not the C++ compiler."""
    backend = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", backend)
    unit = unit_batch()
    compiled = build(here("twelve_pixels"), compiled=True)
    torch.testing.assert_close(compiled(unit), build(here("twelve_pixels"))(unit))
    assert compiled.describe() == build(here("twelve_pixels")).describe()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rum:x", "did you mean run"),
        ("", "unknown kind"),
        ("run:", "expected run:FOLDER"),
        ("run:x?sise=3", "unknown or empty option 'sise=3'; did you mean size"),
        (here("twelve_pixels") + "?size=2.5", "size: expected a whole number, got '2.5'"),
        (here("twelve_pixels") + "?mean=a", "mean: expected numbers with commas, got 'a'"),
        (here("twelve_pixels") + "?std=1,2", "expected mean and std, above 0, of 3 channels"),
        (here("twelve_pixels") + "?std=0", "expected mean and std, above 0, of 3 channels"),
        ("module:tests.distill.test_distill_teacher", "expected module:function, got"),
        ("module:no.such.package:f", "cannot import no.such.package"),
        (here("twelve_pixel"), "did you mean twelve_pixels"),
        (here("only_a_module"), "expected .torch.nn.Module, mean, std, image_size., got Sequential"),
        (here("nan_logits"), "NaN or infinite logits"),
        (here("feature_map"), "got .2, 4, 6, 6.; it gives features"),
        (here("features_and_logits"), "got tuple; it gives features"),
        (here("wrong_width"), "fails on two images of 8 px"),
    ],
)
def test_wrong_teacher_is_refused_before_training(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(spec)


def test_class_count_of_teacher_and_data_must_agree() -> None:
    with pytest.raises(ValueError, match="has 4 outputs, the data has 10 classes"):
        build(here("twelve_pixels"), num_classes=10)


def test_missing_run_folder_is_reported_by_the_loader() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is no run folder"):
        build("run:nowhere")
