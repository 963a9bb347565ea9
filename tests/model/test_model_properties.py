"""Properties over the space of specs: a valid one builds and agrees with its plain twin, any other is refused."""

import math
from dataclasses import fields, replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.plain_sret import PlainSReT
from sret_scale.memory.planning import costs
from sret_scale.memory.planning.instrument import LiveBytes
from sret_scale.model import Noise, SReT, SReTConfig, StageConfig, describe
from sret_scale.model import config as spec


@st.composite
def stage_options(draw: st.DrawFn) -> dict[str, Any]:
    """Any fields of a stage, most of them valid."""
    slices = draw(st.sampled_from(get_args(spec.Slices)))
    groups = tuple(draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=3)))
    return {
        "num_heads": draw(st.sampled_from([1, 2, 4, 3])),
        "num_blocks": draw(st.integers(1, 2)),
        "num_loops": draw(st.integers(1, 3)),
        "loop_order": draw(st.sampled_from(get_args(spec.LoopOrder))),
        "slices": slices,
        "groups": groups if slices == "raster" else (1,),
        "window": draw(st.integers(2, 4)),
        "permute_from_loop": draw(st.integers(0, 2)),
        "mlp_ratio": draw(st.sampled_from([1.5, 2.3])),
        "projections": draw(st.sampled_from(get_args(spec.ProjectionPolicy))),
        "projection_ratio": draw(st.sampled_from([0.5, 1.0])),
        "branch_scheme": draw(st.sampled_from(get_args(spec.BranchScheme))),
        "skip": draw(st.sampled_from(get_args(spec.Skip))),
        "norm_placement": draw(st.sampled_from(get_args(spec.NormPlacement))),
        "conditioning": draw(st.sampled_from(get_args(spec.ConditioningKind))),
        "conditioning_rank": draw(st.integers(1, 2)),
    }


@st.composite
def model_options(draw: st.DrawFn) -> dict[str, Any]:
    """Any fields of a model with one or two stages."""
    stem = draw(st.sampled_from(get_args(spec.StemKind)))
    strides = draw(st.sampled_from([(2, 1, 1), (2, 2, 1), (1, 2, 1)]))
    return {
        "stage_options": [{"width": 8} | draw(stage_options()), {"width": 16} | draw(stage_options())][
            : draw(st.integers(1, 2))
        ],
        "image_size": draw(st.sampled_from([10, 12] if stem == "pixels" else [16, 20])),
        "num_classes": 5,
        "stem": stem,
        "stem_strides": strides if stem == "convolutions" else (1, 1, 1),
        "positions": draw(st.sampled_from(get_args(spec.Positions))),
        "head": draw(st.sampled_from(get_args(spec.Head))),
        "stem_norm": draw(st.sampled_from(get_args(spec.StemNorm))),
        "group_fit": draw(st.sampled_from(get_args(spec.GroupFit))),
    }


def build(options: dict[str, Any]) -> SReTConfig:
    rest = {key: value for key, value in options.items() if key != "stage_options"}
    return SReTConfig(stages=tuple(StageConfig(**stage) for stage in options["stage_options"]), **rest)


def is_valid(options: dict[str, Any]) -> bool:
    """What of the options above can disagree: heads with the width, and groups with the tokens."""
    side = options["image_size"]
    for stride in options["stem_strides"]:
        side = math.ceil(side / stride)
    for stage in options["stage_options"]:
        groups = stage["groups"][: stage["num_loops"]]
        divide = all(side**2 % count == 0 for count in groups)
        if stage["num_heads"] == 3 or not (divide or options["group_fit"] == "nearest"):
            return False
        side = math.ceil(side / 2)
    return True


def shaken(config: SReTConfig) -> SReT:
    """A float64 model whose parameters all differ from their first values, so that no term is hidden by a zero."""
    torch.manual_seed(0)
    model = SReT(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images_of(config: SReTConfig, batch: int = 2) -> Tensor:
    side = config.image_size
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, config.in_channels, side, side, generator=generator, dtype=torch.float64)


@pytest.mark.lengthy
@settings(max_examples=50, deadline=None)
@given(model_options())
def test_a_spec_is_refused_or_agrees_with_its_twin(options: dict[str, Any]) -> None:
    if not is_valid(options):
        with pytest.raises(ValueError, match=r"heads|groups"):
            build(options)
        return
    config = build(options)
    model = shaken(config)
    images_BCHW, noise = images_of(config), Noise(3, 4)
    parameters = list(model.parameters())
    logits, twin_logits = model(images_BCHW, noise), PlainSReT(model)(images_BCHW, noise)
    torch.testing.assert_close(logits, twin_logits, rtol=0, atol=1e-9)
    grads = torch.autograd.grad(logits.square().sum(), parameters)
    twin_grads = torch.autograd.grad(twin_logits.square().sum(), parameters)
    for (name, _), grad, twin_grad in zip(model.named_parameters(), grads, twin_grads, strict=True):
        assert grad.isfinite().all(), name
        scale = max(1.0, float(twin_grad.abs().max()))
        assert float((grad - twin_grad).abs().max()) <= 1e-9 * scale, name


@pytest.mark.lengthy
@settings(max_examples=25, deadline=None)
@given(model_options())
def test_counts_equal_the_real_ones(options: dict[str, Any]) -> None:
    if not is_valid(options):
        return
    config = build(options)
    counts = describe(config)
    model = shaken(config)
    # The plain twin of windows has no padding, whose work counts.
    twin = PlainSReT(model) if all(stage.slices == "raster" for stage in config.stages) else model
    assert counts["parameters"] == sum(parameter.numel() for parameter in twin.parameters())
    flops = costs.forward_flops(lambda: twin(images_of(config, batch=1)))
    # The counter does not know matrix-vector products, which are how a batch-free depth coordinate is multiplied.
    if all(stage.conditioning != "norm_by_depth" for stage in config.stages):
        assert counts["macs"] == flops // 2


STAGE = StageConfig(width=8, num_heads=2, num_blocks=1)
MODEL = SReTConfig(stages=(STAGE,), image_size=16)
WRONG: list[object] = [None, "4", "", -1, math.inf, math.nan, {}, set(), [None], ["1"], [0], (True, 2, 2)]


@pytest.mark.parametrize("value", WRONG, ids=[f"{number}-{value}"[:12] for number, value in enumerate(map(str, WRONG))])
@pytest.mark.parametrize("config", [STAGE, MODEL], ids=["stage", "model"])
def test_a_field_of_a_wrong_type_or_size_is_named(config: Any, value: object) -> None:
    names = [field.name for field in fields(config)]
    assert len(names) > 10
    for name in names:
        if (name, value) == ("permutation_seed", -1):
            continue  # any whole number is a seed
        with pytest.raises(ValueError, match=name):
            replace(config, **{name: value})


@pytest.mark.parametrize("scheme", get_args(spec.BranchScheme))
@pytest.mark.parametrize("mask_rate", [0.0, 0.5])
def test_the_operations_differentiate_like_autograd(scheme: str, mask_rate: float) -> None:
    from sret_scale.model.operations import fused
    from sret_scale.model.operations import unfused as plain

    torch.manual_seed(0)
    batch, tokens, width, hidden = 3, 4, 6, 5
    gain_size = width if scheme == "layerscale" else 1
    shapes = [(batch, tokens, width), (width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [*shapes, (1,), (gain_size,)]]
    mask = None if mask_rate == 0.0 else torch.tensor([0.0, 2.0, 2.0], dtype=torch.float64).view(3, 1, 1)

    def run(operations: Any) -> Tensor:
        x, norm, norm_bias, weight1, bias1, weight2, bias2, alpha, gain = leaves
        kwargs = {"alpha": None if scheme == "rezero" else alpha, "gain_R": gain, "mask": mask}
        a = operations.norm_linear(x, norm, norm_bias, weight1, bias1)
        x = operations.project_residual(x, a, weight2, bias2, **kwargs)
        return operations.feed_forward_residual(x, (norm, norm_bias), (weight1, bias1), (weight2, bias2), **kwargs)

    results = []
    for operations in (fused, plain):
        y = run(operations)
        grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
        results.append([y, *(grad for grad in grads if grad is not None)])
    for mine, twin in zip(*results, strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-10, atol=1e-10)


def test_a_feed_forward_frees_its_hidden_layer_unless_the_graph_is_retained() -> None:
    from sret_scale.model.operations.fused import feed_forward_residual

    width, hidden = 8, 32
    x = torch.randn(2, 64, width, requires_grad=True)
    norm = torch.ones(width), torch.zeros(width)
    fc1, fc2 = (torch.randn(hidden, width), torch.zeros(hidden)), (torch.randn(width, hidden), torch.zeros(width))

    def run() -> Tensor:
        return feed_forward_residual(x, norm, fc1, fc2, alpha=None, gain_R=None, mask=None)

    peaks = []
    for retain_graph in (True, False):
        with LiveBytes() as counter:
            y = run()
            counter.restart_peak()
            (gradient,) = torch.autograd.grad(y.sum(), x, retain_graph=retain_graph)
            peaks.append(counter.peak)
    assert peaks[1] < peaks[0]
    y = run()
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], gradient)


def test_a_spec_of_every_conditioning_starts_at_the_tied_model() -> None:
    stage = StageConfig(width=8, num_heads=2, num_blocks=1, num_loops=3, groups=(4, 2))
    config = SReTConfig(stages=(stage,), image_size=16, num_classes=5, stem_strides=(2, 1, 1))
    torch.manual_seed(0)
    tied = SReT(config).double().eval()
    # A tied gain starts at 1: it is there for a step that is the same everywhere, not to make loops differ.
    for kind in set(get_args(spec.ConditioningKind)) - {"input_tied"}:
        model = SReT(replace(config, stages=(replace(stage, conditioning=kind),))).double().eval()
        model.load_state_dict(tied.state_dict(), strict=False)
        torch.testing.assert_close(model(images_of(config)), tied(images_of(config)), rtol=0, atol=1e-12)
