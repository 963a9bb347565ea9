"""Plans of a pass: which loops run, whose branches are detached, where scores are taken."""

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from sret_scale.memory import MemoryConfig, apply_recomputation
from sret_scale.model import Application, Noise, SReT, SReTConfig, StageConfig
from sret_scale.model import config as spec
from sret_scale.model.depth_plan import DepthPlan, StageDepth, first_loops
from tests.model.typed_stages import stages_of

STAGES = (
    StageConfig(width=8, num_heads=2, num_blocks=2, num_loops=4, groups=(4, 2), mlp_ratio=1.5),
    StageConfig(width=16, num_heads=2, num_blocks=1, num_loops=5, groups=(2, 1), mlp_ratio=1.5),
)
CONFIG = SReTConfig(stages=STAGES, image_size=16, num_classes=5, stem_strides=(2, 1, 1), drop_path=0.3)
IMAGES_BCHW = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NOISE = Noise(permutation_seed=3, sample_seed=4)


def model_of(**options: object) -> SReT:
    torch.manual_seed(0)
    model = SReT(replace(CONFIG, stages=tuple(replace(stage, **options) for stage in STAGES))).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def gradients(model: SReT, plan: DepthPlan | None) -> dict[str, Tensor]:
    model.zero_grad()
    scores = model(IMAGES_BCHW, NOISE, None if plan is None else [plan])
    scores.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.lengthy
@pytest.mark.parametrize("policy", get_args(spec.ProjectionPolicy))
@pytest.mark.parametrize("conditioning", get_args(spec.ConditioningKind))
def test_first_loops_are_the_shorter_model(policy: str, conditioning: str) -> None:
    model = model_of(projections=policy, conditioning=conditioning, loop_order="model")
    shorter = model.with_loops((2, 3))
    plan = first_loops(model.config, (2, 3))
    with torch.no_grad():
        # BatchNorm's running moments move with every training pass, the scores depend on the batch's own.
        assert torch.equal(model(IMAGES_BCHW, NOISE, [plan])[0], shorter(IMAGES_BCHW, NOISE))
    expected = gradients(shorter, None)
    got = gradients(model, plan)
    assert torch.equal(
        got["stages.0.blocks.0.attention.qkv.weight"], expected["stages.0.blocks.0.attention.qkv.weight"]
    )


@pytest.mark.parametrize("placement", get_args(spec.NormPlacement))
def test_the_constants_are_those_of_the_shorter_model(placement: str) -> None:
    model = model_of(norm_placement=placement, skip="learned")
    plan = first_loops(model.config, (1, 2))
    assert torch.equal(model(IMAGES_BCHW, NOISE, [plan])[0], model.with_loops((1, 2))(IMAGES_BCHW, NOISE))


def test_all_loops_are_the_model_itself() -> None:
    model = model_of()
    assert torch.equal(model(IMAGES_BCHW, NOISE, [first_loops(model.config, (4, 5))])[0], model(IMAGES_BCHW, NOISE))


def test_which_shared_loops_are_left_out_does_not_matter() -> None:
    model = model_of(projections="per_block", conditioning="norm_by_depth")
    dropped = DepthPlan((StageDepth((1, 3)), StageDepth((0, 2, 4))))
    assert torch.equal(
        model(IMAGES_BCHW, NOISE, [dropped]), model(IMAGES_BCHW, NOISE, [first_loops(model.config, (2, 3))])
    )


def test_what_a_loop_owns_stays_with_it() -> None:
    model = model_of(projections="per_loop")
    got = gradients(model, DepthPlan((StageDepth((1, 3)), StageDepth((0, 4)))))
    owned = {tuple(name.split(".")[1:4:2]) for name in got if ".projections." in name}
    assert owned == {("0", "1"), ("0", "3"), ("1", "0"), ("1", "4")}


def detached_twin(applications: Sequence[Application], x_BND: Tensor) -> Tensor:
    for application in applications:
        skip_BND = application.skipped(x_BND)
        branch_BND = application(x_BND) - skip_BND
        x_BND = skip_BND + (branch_BND.detach() if application.slot.position < 2 else branch_BND)
    return x_BND


@pytest.mark.lengthy
@pytest.mark.parametrize("order", get_args(spec.LoopOrder))
@pytest.mark.parametrize("conditioning", ["none", "norm_by_depth", "input_gated"])
def test_detached_branches_equal_their_twin(order: str, conditioning: str) -> None:
    options = {"loop_order": order, "conditioning": conditioning, "skip": "frozen", "projections": "per_loop"}
    model, twin = model_of(**options), model_of(**options)
    whole = tuple(StageDepth(tuple(range(stage.num_loops)), num_detached=2) for stage in STAGES)
    for stage in stages_of(twin):
        stage.run_chain = detached_twin
    got, expected = gradients(model, DepthPlan(whole)), gradients(twin, None)
    shared = expected.keys() & got.keys()
    # The projections of detached loops have no gradient at all; the twin gives them zeros or none.
    assert {name for name in expected.keys() - got.keys() if expected[name].any()} == set()
    assert not any(f".projections.{loop}." in name for name in got for loop in (0, 1))
    for name in shared:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-11)
    assert torch.equal(model(IMAGES_BCHW, NOISE, [DepthPlan(whole)])[0], model(IMAGES_BCHW, NOISE))


def test_learned_skips_carry_the_gradient_with_their_coefficients() -> None:
    model = model_of(skip="learned")
    plan = DepthPlan((StageDepth((0, 1, 2, 3), num_detached=3), StageDepth((0, 1), num_detached=1)))
    got = gradients(model, plan)
    assert got["position"].any() and got["stem.convs.0.weight"].any()
    assert "stages.1.projections.0.residual.alpha" not in got


@pytest.mark.lengthy
@pytest.mark.parametrize("schedule", ["per_application", "segments", "nested", "binomial"])
def test_every_schedule_gives_the_same_bits_at_any_depth(schedule: str) -> None:
    plan = DepthPlan((StageDepth((0, 1, 3), num_detached=1), StageDepth((0, 2, 3, 4))), supervised=(2,))
    model, plain = model_of(), model_of()
    apply_recomputation(model, MemoryConfig(schedule=schedule, is_checked=True))
    expected, got = gradients(plain, plan), gradients(model, plan)
    assert got.keys() == expected.keys()
    for name in got:
        # Where scores are taken cuts a chain in two, whose sums plain autograd forms in another order.
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-12)
    short = replace(plan, supervised=())
    expected, got = gradients(plain, short), gradients(model, short)
    unsplit = [name for name in got if name.startswith("stages.1")]
    assert [name for name in unsplit if not torch.equal(got[name], expected[name])] == []


@pytest.mark.parametrize("order", get_args(spec.LoopOrder))
def test_scores_are_taken_after_the_loops_asked_for(order: str) -> None:
    model = model_of(loop_order=order).eval()
    every = [tuple(range(stage.num_loops)) for stage in STAGES]
    stages = (StageDepth(every[0]), StageDepth(every[1]))
    early, middle, full = model(IMAGES_BCHW, None, [DepthPlan(stages, supervised=(1, 3))])
    assert torch.equal(full, model(IMAGES_BCHW))
    last = stages_of(model)[-1]
    seen: list[Tensor] = []

    def keep(applications: Sequence[Application], x_BND: Tensor) -> Tensor:
        for application in applications:
            x_BND = application(x_BND)
            if application.slot.loop in (0, 2):
                way = application.gather is not None and last.permutations(None, 1, x_BND.shape[1], x_BND.device)[0]
                seen.append(x_BND if way is False else x_BND[:, way.argsort()])
        return x_BND

    last.run_chain = keep
    model(IMAGES_BCHW)
    # Scores are of means over the tokens, whose order matters to the last bits only.
    for scores, x_BND in zip((early, middle), seen, strict=True):
        torch.testing.assert_close(scores, model.head(model.norm(x_BND.mean(dim=1))))


def test_several_plans_share_the_stem() -> None:
    model = model_of()
    plans = [first_loops(model.config, (1, 1)), first_loops(model.config, (4, 5))]
    calls = []
    model.stem.register_forward_hook(lambda *_: calls.append(1))
    scores = model(IMAGES_BCHW, NOISE, plans)
    assert (scores.shape, len(calls)) == ((2, 2, 5), 1)
    assert torch.equal(scores[1], model(IMAGES_BCHW, NOISE))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (DepthPlan((StageDepth((0,)),)), "one entry for each of 2 stages"),
        (
            DepthPlan((StageDepth((0, 4)), StageDepth((0,)))),
            r"stage 0: expected ascending loops of 0 to 3, got \(0, 4\)",
        ),
        (DepthPlan((StageDepth((1, 0)), StageDepth((0,)))), "ascending"),
        (DepthPlan((StageDepth(()), StageDepth((0,)))), "ascending"),
        (DepthPlan((StageDepth((0, 1), 2), StageDepth((0,)))), "expected 0 to 1 of 2 loops to be detached, got 2"),
        (DepthPlan((StageDepth((0,)), StageDepth((0, 1))), supervised=(2,)), "expected ascending numbers of 1 to 1"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: DepthPlan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of()(IMAGES_BCHW, NOISE, [plan])


def test_a_placement_without_a_skip_cannot_be_detached() -> None:
    plan = DepthPlan((StageDepth((0, 1), 1), StageDepth((0,))))
    with pytest.raises(ValueError, match="norm_placement 'deepnorm' norms the stream itself"):
        model_of(norm_placement="deepnorm")(IMAGES_BCHW, NOISE, [plan])
