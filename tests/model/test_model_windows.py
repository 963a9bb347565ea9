"""Windows: what one application sees, the cone that grows from a pixel, sizes, and a step that can settle."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.plain_windows import cone
from sret_scale.memory import MemoryConfig, apply_recomputation
from sret_scale.model import Noise, SReT, SReTConfig, StageConfig, describe
from sret_scale.model.config import ConditioningKind
from sret_scale.model.depth_plan import DepthPlan, StageDepth
from sret_scale.model.permutation import TokenOrder, reorder_tokens
from sret_scale.model.read_out import read_outs
from sret_scale.model.vision.sret import on_grid
from sret_scale.model.windows import WindowOrder
from tests.model.typed_stages import stages_of

STAGE = StageConfig(
    width=8,
    num_heads=2,
    num_blocks=1,
    num_loops=6,
    slices="windows",
    projections="none",
    norm_placement="outer",
    conditioning="input_tied",
)
CONFIG = SReTConfig(
    stages=(STAGE,),
    image_size=11,
    num_classes=3,
    stem_strides=(1, 1, 1),
    stem="pixels",
    positions="none",
    head="tokens",
)


def model_of(config: SReTConfig) -> SReT:
    torch.manual_seed(0)
    model = SReT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def images_of(config: SReTConfig) -> Tensor:
    return torch.randn(2, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("grid", "window"), [(11, 3), (9, 3), (8, 3), (10, 4), (5, 7), (9, 2)])
@torch.no_grad()
def test_what_a_pixel_cannot_reach_stays_the_same_to_the_bit(grid: int, window: int) -> None:
    pixel = (grid // 2, 1)
    images = images_of(replace(CONFIG, image_size=grid)).double()
    changed = images.clone()
    changed[:, :, *pixel] += 1.0
    sizes = []
    for num_loops in (1, 2, 3, 5):
        stage = replace(STAGE, window=window, num_loops=num_loops)
        model = model_of(replace(CONFIG, image_size=grid, stages=(stage,))).double()
        differs = (model(images) != model(changed)).any(dim=1)
        reachable = cone(grid, window, pixel, num_loops)
        assert not (differs & ~reachable).any(), num_loops
        assert differs[:, reachable].all(), "the twin's cone is wider than the model's"
        sizes.append(int(reachable.sum()))
    assert sizes[0] < sizes[1] or sizes[0] == grid**2


def test_every_token_is_in_one_window_of_each_order() -> None:
    for grid, window in ((7, 3), (8, 3), (9, 4), (15, 5)):
        windows = WindowOrder(grid, window)
        tokens_BND = torch.arange(grid * grid * 2.0).view(1, -1, 2)
        padded = windows.padded(tokens_BND)
        assert torch.equal(windows.cropped(padded), tokens_BND)
        for order, hidden in zip(windows.orders, windows.hidden(padded), strict=True):
            assert order.sort().values.equal(torch.arange(windows.side**2))
            assert int((hidden == 0).sum()) == grid * grid


def test_weights_serve_any_image_size_and_number_of_loops() -> None:
    model = model_of(CONFIG)
    larger = model.with_image_size(17).with_loops(9)
    assert larger(images_of(larger.config)).shape == (2, 3, 17, 17)
    assert larger.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), larger.parameters(), strict=True))


def test_a_larger_image_looks_the_same_where_its_border_is_out_of_reach() -> None:
    model = model_of(CONFIG)
    larger = model.with_image_size(17)
    images = images_of(larger.config)
    with torch.no_grad():
        small, large = model(images[:, :, :11, :11].contiguous()), larger(images)
    assert torch.allclose(small[:, :, :2, :2], large[:, :, :2, :2], atol=1e-5)
    assert not torch.allclose(small[:, :, -1, -1], large[:, :, 10, 10], atol=1e-3)


def test_the_model_of_section_one_has_few_parameters() -> None:
    stage = replace(STAGE, width=16, num_heads=4, mlp_ratio=2.0)
    counts = describe(replace(CONFIG, stages=(stage,), num_classes=2))
    assert counts["parameters"] == 2504
    assert counts["stages"][0]["slices"] == "windows of 3"


@pytest.mark.parametrize("schedule", ["per_application", "binomial"])
def test_recomputation_keeps_the_gradients(schedule: str) -> None:
    plain, repeated = model_of(CONFIG).train(), model_of(CONFIG).train()
    apply_recomputation(repeated, MemoryConfig(schedule=schedule))
    for model in (plain, repeated):
        model(images_of(CONFIG), Noise(0, 0)).square().sum().backward()
    for a, b in zip(plain.parameters(), repeated.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


def test_the_outer_norm_keeps_the_stream_at_one_size() -> None:
    model = model_of(replace(CONFIG, stages=(replace(STAGE, num_loops=300),)))
    torch.nn.init.ones_(model.stages[0].blocks[0].outer_norm.weight)
    torch.nn.init.zeros_(model.stages[0].blocks[0].outer_norm.bias)
    rms = model.forward_features(images_of(CONFIG)).detach().square().mean().sqrt()
    assert float(rms) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"window": 1}, "window of 2 or more"), ({"groups": (4,)}, "in place of groups")],
)
def test_what_windows_cannot_be_is_refused(options: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        replace(STAGE, **options)  # type: ignore[arg-type]


def test_a_pixel_stem_has_no_strides() -> None:
    with pytest.raises(ValueError, match="stem 'pixels' needs stem_strides"):
        replace(CONFIG, stem_strides=(2, 1, 1))


@pytest.mark.parametrize("conditioning", ["none", "input_tied"])
def test_a_start_without_gradient_is_a_state_of_its_own(conditioning: ConditioningKind) -> None:
    """What comes before is a constant: gradients are those of the loops after it, from its state."""
    stage = replace(STAGE, conditioning=conditioning)
    model = model_of(replace(CONFIG, stages=(stage,))).double()
    images = images_of(CONFIG).double()
    plan = DepthPlan((StageDepth(tuple(range(6)), num_detached=4),), supervised=(5,))
    model(images, None, [plan]).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    (stage_,), tokens = stages_of(model), model.stage_input(model.forward_stem(images), 0)
    windows = stage_.windows
    assert windows is not None
    padded = windows.padded(tokens)
    order = TokenOrder(stage_.permutations(None, 6, padded.shape[1], padded.device))
    applications = stage_.chain(stage_.slots, padded, order, None)
    state, total = torch.cat([padded] * (2 if stage_.injected else 1), dim=1), images.new_zeros(())
    for number, application in enumerate(applications):
        state = application(state)
        if number == 3:
            # The input that is carried along keeps its gradient, the stream does not.
            half = padded.shape[1]
            state = torch.cat([state[:, :half].detach(), state[:, half:]], dim=1)
        if number >= 4:
            back = order.way(application.token_order, None)
            assert back is not None
            out = windows.cropped(reorder_tokens(state[:, : padded.shape[1]], *back))
            total = total + model.forward_head(on_grid(out)).square().sum()
    total.backward()
    for name, p in model.named_parameters():
        # What no gradient reaches has none, or zeros.
        pair = [torch.zeros_like(p) if grad is None else grad for grad in (found[name], p.grad)]
        torch.testing.assert_close(*pair, rtol=0, atol=1e-9)


@torch.no_grad()
def test_read_outs_are_those_of_models_of_so_many_loops() -> None:
    model = model_of(CONFIG).with_loops(9)
    images = images_of(CONFIG)
    single = {count: model.with_loops(count)(images) for count in range(1, 9)}
    found = list(read_outs(model, images, (3, 4, 8), mean_of=3))
    assert [one.loops for one in found] == [3, 4, 8]
    for one in found:
        torch.testing.assert_close(one.last, single[one.loops])
        torch.testing.assert_close(one.mean, sum(single[one.loops - back] for back in range(3)) / 3)
        now, before = (model.with_loops(count).forward_features(images) for count in (one.loops, one.loops - 1))
        torch.testing.assert_close(one.steps, (now - before).flatten(1).norm(dim=1) / now.flatten(1).norm(dim=1))
    assert next(read_outs(model, images, (1,))).steps.isnan().all()


@pytest.mark.lengthy
def test_an_update_moves_the_scores_alike_at_every_depth() -> None:
    """The coordinate check of a step that settles: one AdamW step at one rate, from 20 to 300 loops."""
    config = replace(CONFIG, image_size=5)
    labels = torch.randint(3, (2, 5, 5), generator=torch.Generator().manual_seed(2))
    changes = []
    for num_loops in (20, 108, 300):
        torch.manual_seed(0)
        model = SReT(replace(config, stages=(replace(STAGE, num_loops=num_loops),)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        before = model(images_of(config))
        torch.nn.functional.cross_entropy(before, labels).backward()
        optimizer.step()
        with torch.no_grad():
            changes.append(float((model(images_of(config)) - before).square().mean().sqrt()))
    assert min(changes) > 1e-3 and max(changes) < 2 * min(changes)
