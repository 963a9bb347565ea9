"""Padded storage: multiples of 8, the same numbers, zeros that stay zero, the published layout on export."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from sret_scale.model import Noise, SReT, SReTConfig, describe, preset
from sret_scale.model.vision.official import from_published, to_published
from sret_scale.model.vision.padding import padded_state, unpadded_config, unpadded_state
from tests.model.test_model_properties import build, images_of, model_options, shaken

# The narrowest stage of SReT-S, with the heads of 42 channels that it has everywhere.
SMALL_S = replace(preset("sret_s", num_classes=10), stages=preset("sret_s").stages[:1])


def pair(config: SReTConfig) -> tuple[SReT, SReT]:
    """An unpadded model in float64 with shaken weights, and the padded one that stores them."""
    plain = shaken(unpadded_config(config))
    padded = SReT(replace(config, padded=True)).double().eval()
    padded.load_state_dict(padded_state(padded.config, plain.state_dict(), padded.state_dict()))
    return plain, padded


def odd(options: dict[str, Any]) -> SReTConfig:
    """The spec with widths of 6 and 12 instead of 8 and 16, so that every kind of size needs padding."""
    stages = [stage | {"width": stage["width"] * 3 // 4} for stage in options["stage_options"]]
    return build(options | {"stage_options": stages})


@pytest.mark.lengthy
@settings(max_examples=30, deadline=None)
@given(model_options())
def test_a_padded_model_is_the_plain_one_and_its_zeros_stay(options: dict[str, Any]) -> None:
    try:
        config = odd(options)
    except ValueError:
        return
    plain, padded = pair(config)
    images_BCHW, noise = images_of(config), Noise(3, 4)
    like = plain.state_dict()
    for model in (plain, padded):
        model.train()
        model(images_BCHW, noise).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in padded.named_parameters() if parameter.grad is not None}
    # `unpadded_state` refuses padding that is not exactly zero.
    found = unpadded_state(padded.config, grads, {name: like[name] for name in grads})
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        scale = max(1.0, float(parameter.grad.abs().max()))
        assert float((found[name] - parameter.grad).abs().max()) <= 1e-9 * scale, name
    optimizer = torch.optim.AdamW(padded.parameters(), lr=0.01, weight_decay=0.5)
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        padded(images_BCHW, noise).square().sum().backward()
    unpadded_state(padded.config, padded.state_dict(), like)
    plain, padded = pair(config)
    torch.testing.assert_close(padded(images_BCHW), plain(images_BCHW), rtol=0, atol=1e-9)


def test_published_sizes_become_multiples_of_8() -> None:
    with torch.device("meta"):
        small, tiny = SReT(preset("sret_s", padded=True)), SReT(preset("sret_t", padded=True))
    assert small.position.shape[1] == 128
    block, projection = small.stages[2].blocks[0], small.stages[0].projections[0]
    assert block.attention.qkv.weight.shape == (3 * 12 * 48, 512)
    assert block.attention.out.weight.shape == (512, 12 * 48)
    assert projection.feed_forward.fc1.weight.shape == (256, 128)
    hidden = [stage.blocks[0].feed_forward.fc1.weight.shape[0] for stage in tiny.stages]
    assert hidden == [232, 464, 928]
    assert describe(small.config) == describe(preset("sret_s"))


def test_a_padded_model_starts_as_the_plain_one_and_exports_the_same_weights() -> None:
    config = SMALL_S
    models = []
    for padded in (False, True):
        torch.manual_seed(0)
        models.append(SReT(replace(config, padded=padded)))
    plain, padded_model = models
    published = to_published(padded_model.config, padded_model.state_dict())
    expected = to_published(config, plain.state_dict())
    assert published.keys() == expected.keys()
    assert all(torch.equal(published[name], expected[name]) for name in expected)
    state = from_published(padded_model.config, published)
    assert all(torch.equal(state[name], value) for name, value in padded_model.state_dict().items())


def test_damaged_padding_is_refused() -> None:
    config = SMALL_S
    state = SReT(replace(config, padded=True)).state_dict()
    state["stages.0.blocks.0.attention.qkv.bias"][-1] = 1.0
    with pytest.raises(ValueError, match=r"qkv\.bias is not zero"):
        to_published(replace(config, padded=True), state)


def test_more_loops_keep_the_padding() -> None:
    plain, padded = pair(replace(preset("demo_control_20"), image_size=28))
    images_BCHW = images_of(plain.config)
    deeper = padded.with_loops(3)
    expected = plain.with_loops(3)
    torch.testing.assert_close(deeper.eval()(images_BCHW), expected.eval()(images_BCHW), rtol=0, atol=1e-9)


def test_padded_is_a_yes_or_no() -> None:
    with pytest.raises(ValueError, match="padded must be true or false"):
        preset("sret_t", padded="8")
