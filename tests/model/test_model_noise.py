"""Randomness in training, and the norms of the stem."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sret_scale.memory.planning.instrument import LiveBytes
from sret_scale.model import Application, Noise, SReT, SReTConfig, StageConfig
from sret_scale.model.applications import drop_path_rates
from sret_scale.model.config import StemNorm
from sret_scale.model.noise import PermutationSource, drop_path_masks, noise_at
from sret_scale.model.permutation import TokenOrder, reorder_tokens
from sret_scale.model.vision.stem import Stem, SyncBatchNorm, stem_norm
from tests.model.typed_stages import stages_of

STAGE = StageConfig(width=8, num_heads=2, num_blocks=2, num_loops=3, groups=(4, 2), mlp_ratio=1.5)
CONFIG = SReTConfig(stages=(STAGE,), image_size=16, num_classes=5, stem_strides=(2, 1, 1), drop_path=0.4, dropout=0.2)
IMAGES_BCHW = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_an_application_called_again_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    model = SReT(CONFIG)
    calls: list[tuple[Tensor, Tensor]] = []

    def run_twice(applications: Sequence[Application], x_BND: Tensor) -> Tensor:
        for application in applications:
            first, again = application(x_BND), application(x_BND)
            calls.append((first, again))
            x_BND = first
        return x_BND

    stages_of(model)[0].run_chain = run_twice
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(IMAGES_BCHW, Noise(1, 2))
    assert len(calls) == 6
    assert all(torch.equal(first, again) for first, again in calls)


def test_ranks_share_the_token_orders_of_a_step_and_draw_masks_of_their_own() -> None:
    noises = [noise_at(seed=3, step=step, micro_step=0, rank=rank) for step in (7, 8) for rank in (0, 1)]
    source, device = PermutationSource(CONFIG, 0), torch.device("cpu")
    orders = [source(noise, 6, 64, device) for noise in noises]
    masks = [drop_path_masks(torch.full((6,), 0.5), 8, noise, 0) for noise in noises]
    assert torch.equal(orders[0], orders[1]) and torch.equal(orders[2], orders[3])
    assert not torch.equal(orders[0], orders[2])
    assert all(not torch.equal(*pair) for pair in itertools.combinations(masks, 2))


def test_dropout_follows_the_sample_seed_and_is_off_in_evaluation() -> None:
    torch.manual_seed(0)
    model = SReT(replace(CONFIG, drop_path=0.0, stem_norm="layer"))
    first = model(IMAGES_BCHW, Noise(1, 2))
    assert torch.equal(first, model(IMAGES_BCHW, Noise(1, 2)))
    assert not torch.equal(first, model(IMAGES_BCHW, Noise(1, 3)))
    model.eval()
    assert torch.equal(model(IMAGES_BCHW, Noise(1, 2)), model(IMAGES_BCHW, Noise(1, 3)))


def test_drop_path_rates_are_the_published_ones() -> None:
    (rates,) = drop_path_rates(CONFIG)
    assert rates == pytest.approx((0.0, 0.4 / 6))


def test_masks_drop_at_the_rate_and_keep_the_mean() -> None:
    masks = drop_path_masks(torch.tensor([0.0, 0.25]), 20_000, Noise(0, 0), 0)
    assert masks.shape == (2, 2, 20_000, 1, 1)
    assert torch.equal(masks[0], torch.ones(2, 20_000, 1, 1))
    assert float((masks[1] == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(masks[1].mean()) == pytest.approx(1.0, abs=0.02)


def test_a_dropped_sample_skips_the_block() -> None:
    torch.manual_seed(0)
    block = SReT(CONFIG).stages[0].blocks[0]
    x_BND = torch.randn(2, 64, 8)
    masks = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(2, 2, 1, 1)
    y_BND = block(x_BND, 0, 4, masks)
    assert torch.equal(y_BND[0], x_BND[0])
    torch.testing.assert_close(y_BND[1], block(x_BND, 0, 4)[1])


def test_sync_batch_norm_alone_is_batch_norm() -> None:
    torch.manual_seed(0)
    mine, plain = SyncBatchNorm(4), torch.nn.BatchNorm2d(4)
    x_BCHW = torch.randn(3, 4, 5, 5) * 3 + 2
    torch.testing.assert_close(mine(x_BCHW), plain(x_BCHW))
    torch.testing.assert_close(mine.state_dict(), plain.state_dict())
    torch.testing.assert_close(mine.eval()(x_BCHW), plain.eval()(x_BCHW))


def test_sync_batch_norm_over_ranks_is_batch_norm_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(2, 4, 3, 3), torch.randn(4, 4, 3, 3) + 1]
    whole = torch.nn.BatchNorm2d(4)
    expected = whole(torch.cat(parts))
    # Two ranks in one process: the other's sums are computed beside and added, in the order of the two reductions.
    mean = torch.cat(parts).mean(dim=(0, 2, 3))

    def sums(x: Tensor, order: int) -> Tensor:
        if order == 0:
            return torch.cat([x.sum(dim=(0, 2, 3)), torch.tensor([x.numel() / 4])])
        return (x - mean[:, None, None]).square().sum(dim=(0, 2, 3))

    found = []
    for mine, other in (parts, parts[::-1]):
        norm, order = SyncBatchNorm(4), iter((0, 1))
        norm.all_reduce = lambda tensor, other=other, order=order: tensor + sums(other, next(order))  # type: ignore[misc]
        found.append(norm(mine))
        torch.testing.assert_close(norm.running_var, whole.running_var)
    torch.testing.assert_close(torch.cat(found), expected)


@pytest.mark.parametrize("channels", [8, 12])
def test_sample_norms_do_not_depend_on_the_batch(channels: int) -> None:
    x_BCHW = torch.randn(3, channels, 4, 4)
    for kind in ("group", "layer"):
        norm = stem_norm(kind, channels)
        torch.testing.assert_close(norm(x_BCHW)[:1], norm(x_BCHW[:1]))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["batch", "sync_batch", "group", "layer"])
def test_a_stem_that_repeats_its_norms_gives_the_same_bits(kind: StemNorm, autocast: bool) -> None:
    results = []
    for repeats_norms in (False, True):
        torch.manual_seed(0)
        stem = Stem(replace(CONFIG, stem_norm=kind)).train()
        stem.repeats_norms = repeats_norms
        for number in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y_BCHW = stem(IMAGES_BCHW + number)
            y_BCHW.float().square().sum().backward()
        results.append([y_BCHW, *(p.grad for p in stem.parameters()), *stem.buffers()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_stem_that_repeats_its_norms_holds_about_half() -> None:
    held = []
    for repeats_norms in (False, True):
        stem = Stem(replace(CONFIG, stem_norm="batch"))
        stem.repeats_norms = repeats_norms
        for memory_format in (torch.channels_last, torch.contiguous_format):
            images_BCHW = IMAGES_BCHW.contiguous(memory_format=memory_format)
            with LiveBytes(stem.parameters()) as counter:
                y_BCHW = stem(images_BCHW)
                held.append(counter.live - y_BCHW.nbytes)
    # Two layers of 8 x 8 and one of 16 channels at 8 x 8, stored once instead of twice; statistics are small.
    assert held[2] < 0.65 * held[0]
    # Images in another order than the convolution's are copied, and only a stem that repeats makes the copy twice.
    assert held[1] == held[0] + IMAGES_BCHW.nbytes
    assert held[3] == held[2]


def test_a_stem_that_repeats_its_norms_gives_images_their_gradient() -> None:
    gradients: list[Tensor] = []
    for repeats_norms in (False, True):
        torch.manual_seed(0)
        stem, images_BCHW = Stem(CONFIG).train(), IMAGES_BCHW.clone().requires_grad_()
        stem.repeats_norms = repeats_norms
        stem(images_BCHW).square().sum().backward()
        assert images_BCHW.grad is not None
        gradients.append(images_BCHW.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("num_tokens", "dtype"), [(49, torch.int16), (2**15 + 1, torch.int32)])
def test_tables_of_token_orders_are_as_narrow_as_their_tokens_allow(num_tokens: int, dtype: torch.dtype) -> None:
    permutations = torch.stack([torch.randperm(num_tokens) for _ in range(2)])
    order, x_BND = TokenOrder(permutations), torch.arange(float(num_tokens))[None, :, None]
    for target in (0, 1, None):
        tables = order.move_to(target)
        assert tables is not None and all(table.dtype == dtype for table in tables)
        x_BND = reorder_tokens(x_BND, *tables)
        expected = torch.arange(num_tokens) if target is None else permutations[target]
        assert torch.equal(x_BND.flatten(), expected.float())
