"""The presets under timm's roof."""

import importlib

import pytest
import torch

from sret_scale.model import SReT, preset
from sret_scale.model.vision.official import to_published
from sret_scale.timm import import_timm
from sret_scale.timm.sret_model import checkpoint_filter

timm = import_timm()
IMAGES_BCHW = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def test_create_model_takes_classes_and_size() -> None:
    model = timm.create_model("sret_t", num_classes=10, img_size=384)
    assert model.config.image_size == 384
    assert model.get_classifier().out_features == 10
    assert model.default_cfg["input_size"] == (3, 224, 224)
    assert [stage.num_loops for stage in timm.create_model("sret_t", num_loops=4).config.stages] == [4, 4, 4]
    assert "sret_s_no_slice_384" in timm.list_models("sret*")


def test_features_and_head_make_the_scores() -> None:
    model = timm.create_model("demo_control_20", num_classes=10).eval()
    features = model.forward_features(IMAGES_BCHW)
    assert features.shape == (2, 128, 2, 2)
    assert torch.equal(model.forward_head(features), model(IMAGES_BCHW))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(3)
    assert model(IMAGES_BCHW).shape == (2, 3)
    model.reset_classifier(0)
    assert model(IMAGES_BCHW).shape == (2, 128)
    model.reset_classifier(0, "")
    tokens = model(IMAGES_BCHW)
    assert tokens.shape == (2, 128, 2, 2)
    assert torch.allclose(tokens.movedim(1, -1).mean(dim=-1), torch.zeros(()), atol=1e-5)  # each token has its norm
    assert timm.create_model("demo_control_20", num_classes=0, global_pool="")(IMAGES_BCHW).shape == (2, 128, 2, 2)
    with pytest.raises(ValueError, match="SReT pools by average, got global_pool '' for 3 classes"):
        model.reset_classifier(3)


def test_intermediates_and_features_only() -> None:
    model = timm.create_model("demo_control_20").eval()
    last, (first, second) = model.forward_intermediates(IMAGES_BCHW, indices=[0, 1])
    assert (first.shape[1:], second.shape[1:]) == ((32, 7, 7), (64, 4, 4))
    assert torch.equal(last, model.forward_features(IMAGES_BCHW))
    pyramid = timm.create_model("demo_control_20", features_only=True).eval()
    assert [tuple(x.shape[1:]) for x in pyramid(IMAGES_BCHW)] == [(32, 7, 7), (64, 4, 4), (128, 2, 2)]
    assert pyramid.feature_info.channels() == [32, 64, 128]


def test_optimizer_groups_cover_every_parameter_once() -> None:
    model = timm.create_model("demo_control_20")
    for options in ({}, {"layer_decay": 0.75}):
        optimizer = importlib.import_module("timm.optim").create_optimizer_v2(
            model, opt="adamw", lr=1e-3, weight_decay=0.05, **options
        )
        grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
        decay = {
            id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
        }
        assert set(decay.values()) == {0.0, 0.05}
        for name, parameter in model.named_parameters():
            # timm itself spares only what has one dimension; the position has four.
            expected = 0.0 if name == "position" or parameter.ndim <= 1 else 0.05
            assert decay[id(parameter)] == expected, name


def test_gradient_checkpointing_changes_no_gradient() -> None:
    torch.manual_seed(0)
    model = timm.create_model("demo_control_20", drop_path_rate=0.2).train()
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(IMAGES_BCHW).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*grads, strict=True))


def test_a_published_checkpoint_is_read() -> None:
    torch.manual_seed(0)
    source = SReT(preset("sret_t"))
    model = timm.create_model("sret_t")
    published = {"model": to_published(source.config, source.state_dict())}
    model.load_state_dict(checkpoint_filter(published, model))
    assert torch.equal(model.position, source.position)
    larger = timm.create_model("sret_t", img_size=384)
    larger.load_state_dict(checkpoint_filter(published, larger))
    assert larger.position.shape == (1, 64, 48, 48)


def test_what_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="square"):
        timm.create_model("sret_t", img_size=(224, 192))
    with pytest.raises(ValueError, match="pools by average"):
        timm.create_model("sret_t", global_pool="max")
