"""What the telemetry's probe reads off, against plain computations; its alarms; that it changes nothing."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.plain_windows import window_slices
from sret_scale.config.precision import Precision
from sret_scale.memory import MemoryConfig, apply_recomputation
from sret_scale.model import Application, Noise, SReT, SReTConfig, StageConfig
from sret_scale.model.config import BranchScheme, Skip
from sret_scale.model.depth_plan import DepthPlan, StageDepth
from sret_scale.model.vision.padding import padded_state
from sret_scale.train.telemetry import Telemetry, TelemetryConfig, telemetry_of
from sret_scale.train.telemetry.alarms import alarms, findings, growth_per_loop
from sret_scale.train.telemetry.depth_probe import BACKWARD, FORWARD, BlockUses, probe
from sret_scale.train.telemetry.statistics import attention_entropy, rank_ratio, token_cosine
from sret_scale.train.telemetry.truncation import gradient_cosines
from tests.model.typed_stages import stages_of

STAGES = (
    StageConfig(width=8, num_heads=2, num_blocks=2, num_loops=3, groups=(4, 2), skip="learned"),
    StageConfig(width=16, num_heads=2, num_blocks=1, num_loops=2, groups=(2, 1), conditioning="input_gated"),
)
CONFIG = SReTConfig(stages=STAGES, image_size=16, num_classes=5, stem_strides=(2, 1, 1), drop_path=0.3)
IMAGES_BCHW = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS_B = torch.tensor([0, 3, 1])
NOISE = Noise(permutation_seed=3, sample_seed=4)


def model_of(config: SReTConfig = CONFIG) -> SReT:
    torch.manual_seed(0)
    model = SReT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def loss_of(scores_BC: Tensor) -> Tensor:
    return F.cross_entropy(scores_BC, LABELS_B[: len(scores_BC)])


def test_gradients_of_the_uses_add_up_to_the_gradient() -> None:
    model = model_of()
    blocks = probe(model, IMAGES_BCHW, loss_of, NOISE, "fp32")
    model.eval()
    loss_of(model(IMAGES_BCHW, NOISE)).backward()
    for block in blocks:
        module = model.stages[block.stage].blocks[block.block]
        grads = [p.grad.flatten() for name, p in module.named_parameters() if not name.startswith("conditioning.")]
        norms = block.values["gradient_norm"]
        # |sum g|^2 = sum |g|^2 + 2 sum of products; with two uses their one cosine says it all.
        if len(norms) == 2:
            cosine = block.values["gradient_cosine"][0]
            whole = math.sqrt(norms[0] ** 2 + norms[1] ** 2 + 2 * norms[0] * norms[1] * cosine)
            assert whole == pytest.approx(float(torch.cat(grads).norm()), rel=1e-4)
            assert block.gradient_agreement == pytest.approx(cosine, rel=1e-3)
        assert all(value > 0 for value in norms) and math.isnan(block.values["gradient_cosine"][-1])
    assert [(block.stage, block.block, len(block.values["rms"])) for block in blocks] == [
        (0, 0, 3),
        (0, 1, 3),
        (1, 0, 2),
    ]


def test_statistics_of_the_stream_equal_plain_ones() -> None:
    model = model_of(replace(CONFIG, stages=(replace(STAGES[0], groups=(1,), num_blocks=1),), drop_path=0.0))
    (block,) = probe(model, IMAGES_BCHW, loss_of, NOISE, "fp32")
    model.eval()
    seen: list[Tensor] = []

    def watch(applications: Sequence[Application], x_BND: Tensor) -> Tensor:
        for application in applications:
            seen.append(x_BND)
            x_BND = application(x_BND)
        return x_BND

    stage = stages_of(model)[0]
    stage.run_chain = watch
    with torch.no_grad():
        out_BDHW = model.forward_features(IMAGES_BCHW)
    streams = [*seen, out_BDHW.flatten(2).transpose(1, 2)]
    assert len(streams) == 1 + STAGES[0].num_loops
    for loop, (x_BND, y_BND) in enumerate(itertools.pairwise(streams)):
        assert block.values["rms"][loop] == pytest.approx(float(y_BND.square().mean().sqrt()), rel=1e-5)
        step = float((y_BND - x_BND).norm() / y_BND.norm())
        assert block.values["step_ratio"][loop] == pytest.approx(step, rel=1e-4)
        alphas = [
            r.alpha for r in (stage.blocks[0].residual1, stage.blocks[0].residual2, stage.projections[loop].residual)
        ]
        kept_BND = x_BND * torch.cat([alpha.detach() for alpha in alphas]).prod()
        assert block.values["branch_ratio"][loop] == pytest.approx(
            float((y_BND - kept_BND).norm() / kept_BND.norm()), rel=1e-4
        )
        assert block.values["max_abs"][loop] >= float(y_BND.abs().max()) * 0.9999


def test_token_statistics_know_collapse_and_spread() -> None:
    spread = torch.eye(4).expand(2, 4, 4)
    alike = torch.ones(2, 4, 4)
    assert token_cosine(alike).item() == pytest.approx(1.0)
    assert token_cosine(spread).item() == pytest.approx(0.0, abs=1e-6)
    assert rank_ratio(alike).item() == pytest.approx(0.25)
    assert rank_ratio(spread).item() == pytest.approx(1.0)
    x_BND = torch.randn(2, 7, 5)
    pairs = [F.cosine_similarity(x[i], x[j], dim=0) for x in x_BND for i in range(7) for j in range(7) if i != j]
    assert token_cosine(x_BND).item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-4)
    assert math.isnan(token_cosine(x_BND[:, :1]).item())


def test_attention_entropy_is_that_of_the_weights() -> None:
    qkv_BNC = torch.randn(2, 12, 3 * 8)
    q, k, _ = qkv_BNC.view(2, 3, 4, 3, 2, 4).permute(3, 0, 1, 4, 2, 5)  # three groups of four tokens, two heads
    weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    expected = -(weights * weights.log()).sum(-1).mean() / math.log(4)
    assert attention_entropy(qkv_BNC, 3, 2).item() == pytest.approx(expected.item(), rel=1e-5)
    assert attention_entropy(torch.zeros(1, 40, 6), 1, 1).item() == pytest.approx(1.0)


def test_the_entropy_in_windows_has_the_bias_and_leaves_padding_out() -> None:
    stage = StageConfig(width=8, num_heads=2, num_blocks=1, num_loops=1, slices="windows", projections="none")
    config = SReTConfig(stages=(stage,), image_size=5, stem="pixels", stem_strides=(1, 1, 1), positions="none")
    model = model_of(config).eval()
    (block,) = probe(model, IMAGES_BCHW[:, :, :5, :5].contiguous(), lambda scores: scores.square().sum(), NOISE, "fp32")
    attention, entropies = stages_of(model)[0].blocks[0].attention, []
    with torch.no_grad():
        tokens_BND = model.stage_input(model.forward_stem(IMAGES_BCHW[:, :, :5, :5].contiguous()), 0)
        qkv = stages_of(model)[0].blocks[0].qkv(tokens_BND, 0).view(3, 5, 5, 3, 2, 4)
        for rows, columns in window_slices(5, 3, 0):
            query, key, _ = qkv[:, rows, columns].flatten(1, 2).permute(2, 0, 3, 1, 4)
            places = torch.cartesian_prod(torch.arange(5)[rows], torch.arange(5)[columns])
            away = places[:, None] - places[None] + 2
            scores = query @ key.transpose(-1, -2) / 2 + attention.offsets[:, away[..., 0] * 5 + away[..., 1]]
            weights = scores.softmax(-1)
            entropies.append(-(weights * weights.log()).sum(-1).flatten())
    expected = torch.cat(entropies).mean() / math.log(9)
    assert block.values["attention_entropy"][0] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("schedule", ["none", "binomial"])
def test_a_probe_leaves_everything_as_it_was(precision: Precision, schedule: str) -> None:
    model = model_of(replace(CONFIG, permutation="random", dropout=0.1))
    apply_recomputation(model, MemoryConfig(schedule=schedule))
    model(IMAGES_BCHW, NOISE).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    chains, state = [stage.run_chain for stage in model.stages], torch.random.get_rng_state()
    probe(model, IMAGES_BCHW, loss_of, NOISE, precision)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    after = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert after.keys() == gradients.keys() and all(torch.equal(after[name], gradients[name]) for name in gradients)
    assert all(module.training for module in model.modules())
    assert [stage.run_chain for stage in model.stages] == chains
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_failing_probe_puts_the_model_back() -> None:
    model = model_of()
    chain = model.stages[0].run_chain
    with pytest.raises(ZeroDivisionError):
        probe(model, IMAGES_BCHW, lambda scores: scores * (1 / 0), NOISE, "fp32")
    assert model.training and model.stages[0].run_chain == chain


def test_the_record_has_the_documented_form() -> None:
    deep = replace(STAGES[1], num_loops=40, conditioning="none")
    model = model_of(replace(CONFIG, stages=(STAGES[0], deep)))
    telemetry = Telemetry(model, TelemetryConfig(interval_steps=5, num_images=2), "fp32")
    assert [step for step in range(12) if telemetry.is_due(step)] == [0, 5, 10]
    assert telemetry.after_update() is None
    telemetry.look(IMAGES_BCHW, lambda scores, part: F.cross_entropy(scores, LABELS_B[part]), NOISE)
    telemetry.before_update()
    with torch.no_grad():
        model.head.weight.add_(0.5)
    record = json.loads(json.dumps(telemetry.after_update(), allow_nan=False))
    assert (
        set(record) == {"num_images", "blocks", "summary", "alarms", "probe_s", "classes"} and record["num_images"] == 2
    )
    *_, last = record["blocks"]
    assert (last["stage"], last["block"], last["num_loops"]) == (1, 0, 40)
    assert len(last["loops"]) == 32 and (last["loops"][0], last["loops"][-1]) == (0, 39)
    assert {len(last[name]) for name in (*FORWARD, *BACKWARD)} == {32} and last["gradient_cosine"][-1] is None
    assert record["classes"]["head"]["update"] == pytest.approx(0.5 * math.sqrt(model.head.weight.numel()), rel=1e-3)
    assert record["classes"]["tied"]["update"] == 0 and record["classes"]["tied"]["norm"] > 0
    assert telemetry.after_update() is None


def test_only_rank_0_with_whole_parameters_has_telemetry() -> None:
    model, on = model_of(), TelemetryConfig()
    assert telemetry_of(model, on, "fp32", is_main=True, zero_stage=2) is not None
    assert telemetry_of(model, on, "fp32", is_main=True, zero_stage=3) is None
    assert telemetry_of(model, on, "fp32", is_main=False, zero_stage=0) is None
    assert telemetry_of(model, TelemetryConfig(interval_steps=0), "fp32", is_main=True, zero_stage=0) is None


def uses(**lists: list[float]) -> BlockUses:
    healthy = {"rms": 1.0, "branch_ratio": 0.1, "step_ratio": 0.1, "token_cosine": 0.2, "rank_ratio": 0.5}
    healthy |= {"attention_entropy": 0.8, "max_abs": 5.0, "gradient_norm": 0.01, "gradient_cosine": 0.1}
    return BlockUses(2, 0, {}, {name: [value] * 12 for name, value in healthy.items()} | lists)


@pytest.mark.parametrize(
    ("lists", "sentence"),
    [
        (
            {"rms": [1.3**loop for loop in range(12)], "max_abs": [5 * 1.3**loop for loop in range(12)]},
            "stage 2 grows 1.3-fold a loop: expect fp16 overflow at loop 38; try branch scheme loop_aware",
        ),
        ({"rms": [math.nan] * 12}, "stage 2 has values that are not numbers"),
        ({"max_abs": [4e37] * 12}, "stage 2 reaches 4e+37 of at most"),
        ({"token_cosine": [0.999] * 12}, "stage 2 has collapsed"),
        ({"step_ratio": [0.1] * 5 + [1e-6] * 7}, "stage 2 does nothing in the last 7 loops"),
        ({"gradient_norm": [1.0] * 11 + [1e-9]}, "stage 2 has loops that hardly learn: 1 of 12"),
        ({"attention_entropy": [0.001] * 12}, "stage 2 looks at single tokens"),
    ],
)
def test_alarms_say_what_is_wrong(lists: dict[str, list[float]], sentence: str) -> None:
    found = findings([uses(**lists), uses(**lists)], ["published"] * 3, "bf16")
    ((stage, kind),) = found
    assert stage == 2 and found[stage, kind].startswith(sentence)
    # What an untrained model may show is an alarm when it lasts.
    assert alarms(found, set()) == ({} if kind in ("collapse", "idle", "entropy") else found)
    assert alarms(found, set(found)) == found


def test_a_healthy_model_raises_no_alarm() -> None:
    assert findings([uses()], ["published"] * 3, "bf16") == {}
    # Two of 60 seeds begin with tokens that are all alike, which is an alarm only where it lasts.
    torch.manual_seed(0)
    model = SReT(CONFIG)
    assert findings(probe(model, IMAGES_BCHW, loss_of, NOISE, "fp32"), ["published"] * 2, "fp32") == {}


def test_a_stream_to_which_every_loop_adds_as_much_raises_no_alarm() -> None:
    """As from embeddings that are small beside what branches add; what grows by a factor does so to the end."""
    added = [0.03 + 0.023 * loop for loop in range(27)]
    assert growth_per_loop(added) > 1.05 and added[-1] > 10 * added[0]
    assert findings([uses(rms=added)], ["published"] * 3, "fp32") == {}
    by_a_factor = [0.03 * 1.12**loop for loop in range(27)]
    assert list(findings([uses(rms=by_a_factor)], ["published"] * 3, "fp32")) == [(2, "growth")]


def told(scheme: BranchScheme, num_loops: int, rates: list[float]) -> list[list[str]]:
    """The alarms before each update of a model that learns four images; one probe an entry of `rates`."""
    torch.manual_seed(0)
    skip: Skip = "learned" if scheme == "published" else "frozen"
    stage = StageConfig(width=8, num_heads=1, num_blocks=1, num_loops=num_loops, projections="per_block")
    config = SReTConfig(
        stages=(replace(stage, branch_scheme=scheme, skip=skip),), image_size=16, num_classes=5, stem_strides=(2, 2, 2)
    )
    model, found = SReT(config).train(), []
    optimizer = torch.optim.AdamW(model.parameters())
    telemetry = Telemetry(model, TelemetryConfig(), "fp32")
    for rate in rates:
        telemetry.look(IMAGES_BCHW, lambda scores, part: F.cross_entropy(scores, LABELS_B[part]), NOISE)
        telemetry.before_update()
        optimizer.param_groups[0]["lr"] = rate
        loss_of(model(IMAGES_BCHW, NOISE)).backward()
        optimizer.step()
        optimizer.zero_grad()
        record = telemetry.after_update()
        assert record is not None
        found.append(record["alarms"])
    return found


@pytest.mark.lengthy
def test_a_run_that_grows_alarms_and_a_healthy_one_does_not() -> None:
    # Found on Fashion-MNIST too: the published branches grow 1.4- to 1.9-fold a loop at 108 (docs/results.md).
    rates = [8e-3] * 4
    *_, grown = told("published", 108, rates)
    assert "grows" in grown[0] and "expect fp16 overflow at loop" in grown[0] and "try branch scheme" in grown[0]
    for num_loops in (20, 108):
        assert told("loop_aware", num_loops, rates) == [[]] * 4


def test_a_rate_that_destroys_a_model_is_an_alarm() -> None:
    *_, lost = told("loop_aware", 4, [float("nan"), 0.0])
    assert lost == [
        "stage 0 has values that are not numbers: lower optim.learning_rate, or use branch scheme loop_aware"
    ]


@pytest.mark.slow
def test_the_published_branches_alarm_at_1000_applications_and_loop_aware_ones_do_not() -> None:
    *_, sick = told("published", 1000, [8e-3] * 6)
    assert any("grows" in sentence or "not numbers" in sentence for sentence in sick)
    for num_loops in (512, 1000):
        assert told("loop_aware", num_loops, [8e-3] * 3) == [[]] * 3


def test_growth_is_the_factor_between_loops() -> None:
    assert growth_per_loop([2.0 * 1.7**loop for loop in range(9)]) == pytest.approx(1.7)
    assert growth_per_loop([3.0]) == 1.0


def test_an_alarm_is_told_once_for_a_stage_and_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry = Telemetry(model_of(), TelemetryConfig(), "fp32")
    grows = {(2, "growth"): "stage 2 grows 1.3-fold a loop: expect fp16 overflow at loop 60"}
    also = {(2, "growth"): grows[2, "growth"].replace("60", "58"), (1, "limit"): "stage 1 ..."}
    for found, new in ((grows, list(grows.values())), (also, ["stage 1 ..."]), (grows, [])):
        monkeypatch.setattr("sret_scale.train.telemetry.record.findings", lambda *_, found=found: found)
        telemetry.look(IMAGES_BCHW, lambda scores, _: scores.square().mean(), Noise(0, 0))
        assert telemetry.new_alarms == new


def test_truncation_is_measured_against_the_full_gradient() -> None:
    model = model_of().eval()
    kinds = {
        "tied": [n for n, _ in model.named_parameters() if ".blocks.0." in n],
        "head": ["head.weight", "head.bias"],
    }
    kinds["early"] = [n for n, _ in model.named_parameters() if n.startswith("stages.0.projections.0.")]
    plan = DepthPlan((StageDepth((0, 1, 2), 1), StageDepth((0, 1), 1)))
    cosines = gradient_cosines(model, IMAGES_BCHW, loss_of, NOISE, plan, kinds)
    # The forward pass is the same, so what only sees its end has the same gradient; a detached projection has none.
    assert cosines["head"] == pytest.approx(1.0) and math.isnan(cosines["early"])
    assert 0 < cosines["tied"] < 0.9999
    whole = DepthPlan((StageDepth((0, 1, 2)), StageDepth((0, 1))))
    assert gradient_cosines(model, IMAGES_BCHW, loss_of, NOISE, whole, kinds)["tied"] == pytest.approx(1.0)
    assert all(value.grad is None for value in model.parameters())


def test_a_record_of_a_truncated_step_has_the_cosines() -> None:
    telemetry = Telemetry(model_of(), TelemetryConfig(), "fp32")
    plan = DepthPlan((StageDepth((0, 1, 2), 1), StageDepth((0, 1), 1)))
    telemetry.look(IMAGES_BCHW, lambda scores, part: F.cross_entropy(scores, LABELS_B[part]), NOISE, plan)
    telemetry.before_update()
    record = telemetry.after_update()
    assert record is not None and 0 < record["truncation"]["stem"] <= 1


def test_padding_is_no_part_of_what_is_read_off() -> None:
    odd = replace(CONFIG, stages=(replace(STAGES[0], width=12, num_heads=3),), drop_path=0.0)
    plain = model_of(odd)
    padded = SReT(replace(odd, padded=True))
    padded.load_state_dict(padded_state(padded.config, plain.state_dict(), padded.state_dict()))
    (ours, _), (theirs, _) = (probe(model, IMAGES_BCHW, loss_of, NOISE, "fp32") for model in (padded, plain))
    assert ours.values.keys() == theirs.values.keys() >= {"rms", "step_ratio", "branch_ratio"}
    for name, values in theirs.values.items():
        assert ours.values[name] == pytest.approx(values, rel=1e-3, nan_ok=True), name
