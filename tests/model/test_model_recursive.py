"""timm's backbones made recursive: the same function where nothing is tied, and what ties, counts and refuses."""

import copy
import importlib
import re
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import nn

from sret_scale.memory import MemoryConfig
from sret_scale.model.config import LoopOrder
from sret_scale.timm import import_timm, make_recursive, set_loops
from sret_scale.timm.recursive import RecursiveBlocks, recursions
from tests.tiny import ROOT

timm = import_timm()
mixer, vit = timm.models.mlp_mixer, partial(timm.models.VisionTransformer, patch_size=7, embed_dim=16, num_heads=2)
SIZE = {"img_size": 28, "num_classes": 5}
_MIXER = partial(timm.models.MlpMixer, patch_size=7, embed_dim=16, num_blocks=4, **SIZE)
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "vit": partial(vit, depth=4, **SIZE),
    "mixer": _MIXER,
    "resmlp": partial(_MIXER, block_layer=mixer.ResBlock, norm_layer=mixer.Affine, mlp_ratio=4),
    "gmlp": partial(_MIXER, block_layer=mixer.SpatialGatingBlock, mlp_layer=mixer.GatedMlp, mlp_ratio=4),
    "cait": partial(timm.models.Cait, patch_size=7, embed_dim=16, depth=4, num_heads=2, **SIZE),
    "convmixer": partial(timm.models.ConvMixer, dim=16, depth=4, kernel_size=3, patch_size=7, num_classes=5),
    "swin": partial(
        timm.models.SwinTransformer,
        patch_size=4,
        window_size=2,
        embed_dim=16,
        depths=(4, 4),
        num_heads=(2, 2),
        drop_path_rate=0.0,
        **SIZE,
    ),
}
UNIT = {"swin": 2}


def made(family: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return FAMILIES[family](), torch.randn(2, 3, 28, 28)


def outcome(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    out = model(images)
    return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)]


@pytest.mark.lengthy
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_ties_it_is_the_model_to_the_bit(family: str, is_training: bool) -> None:
    model, images = made(family)
    expected = outcome(copy.deepcopy(model).train(is_training), images)
    schedules = ["none"] if family == "convmixer" else ["none", "per_application", "binomial"]
    unit = UNIT.get(family, 1)
    for schedule in schedules:
        ours = make_recursive(copy.deepcopy(model), unit=unit, memory=MemoryConfig(schedule=schedule)).train(
            is_training
        )
        if unit == 1:
            assert ours.state_dict().keys() == model.state_dict().keys()
        for left, right in zip(outcome(ours, images), expected, strict=True):
            assert (left is None and right is None) or torch.equal(left, right)


def test_arguments_of_blocks_go_to_every_application() -> None:
    """Eva goes through its blocks itself, and hands each a rotary table."""
    torch.manual_seed(0)
    model = timm.models.Eva(patch_size=7, embed_dim=16, depth=4, num_heads=2, use_rot_pos_emb=True, **SIZE)
    images = torch.randn(2, 3, 28, 28)
    expected = outcome(copy.deepcopy(model), images)
    for left, right in zip(outcome(make_recursive(copy.deepcopy(model)), images), expected, strict=True):
        assert (left is None and right is None) or torch.equal(left, right)
    tied = make_recursive(copy.deepcopy(model), num_blocks=2, num_loops=3, init="first")
    model.blocks = nn.ModuleList([model.blocks[index] for index in (0, 0, 0, 2, 2, 2)])
    assert torch.equal(tied(images), model(images))


@pytest.mark.lengthy
@pytest.mark.parametrize("order", get_args(LoopOrder))
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_blocks_tied_are_the_same_function_with_fewer_weights(family: str, order: Any) -> None:
    model, images = made(family)
    unit = UNIT.get(family, 1)
    chains = [module for name, module in model.named_modules() if name.endswith("blocks")]
    for chain in chains:
        units = [nn.Sequential(*list(chain)[i : i + unit]) for i in range(0, len(list(chain)), unit)]
        for other in units[1:]:
            other.load_state_dict(units[0].state_dict())
    expected, before = model.eval()(images), sum(p.numel() for p in model.parameters())
    ours = make_recursive(model, num_blocks=1, order=order, unit=unit).eval()
    torch.testing.assert_close(ours(images), expected)
    assert sum(p.numel() for p in ours.parameters()) < 0.7 * before
    assert [len(chain) for chain in recursions(ours)] == [4 // unit] * len(chains)
    assert not any(re.search(r"blocks\.[1-9]", name) for name in ours.state_dict())
    set_loops(ours, 7)
    assert recursions(ours)[0].describe(_example(ours, images))["applications"] == 7


def _example(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the first chain gets."""
    seen: list[torch.Tensor] = []
    with recursions(model)[0].register_forward_pre_hook(lambda _, given: seen.append(given[0])):
        model(images)
    return seen[0]


def _weight(chain: RecursiveBlocks, block: int) -> torch.Tensor:
    return chain.blocks[block].get_parameter("attn.qkv.weight")


def test_mean_and_first_of_the_merged_blocks() -> None:
    model, _ = made("vit")
    weights = [block.attn.qkv.weight.clone() for block in model.blocks]
    mean = recursions(make_recursive(copy.deepcopy(model), num_blocks=2))[0]
    assert torch.allclose(_weight(mean, 1), (weights[2] + weights[3]) / 2)
    turns = recursions(make_recursive(copy.deepcopy(model), num_blocks=2, order="model"))[0]
    assert torch.allclose(_weight(turns, 1), (weights[1] + weights[3]) / 2)
    back = recursions(make_recursive(copy.deepcopy(model), num_blocks=2, order="model_reversed"))[0]
    assert torch.allclose(_weight(back, 1), (weights[1] + weights[2]) / 2)
    first = recursions(make_recursive(model, num_blocks=2, init="first"))[0]
    assert torch.equal(_weight(first, 1), weights[2])


def test_a_tied_block_has_the_mean_of_the_drop_path_rates() -> None:
    for num_blocks, expected in ((1, [0.15]), (2, [0.05, 0.25])):
        model = make_recursive(vit(depth=4, drop_path_rate=0.3, **SIZE), num_blocks=num_blocks)
        rates = [block.get_submodule("drop_path2").drop_prob for block in recursions(model)[0].blocks]
        assert rates == pytest.approx(expected)


def test_projections_and_dropout_train_under_a_budget() -> None:
    torch.manual_seed(0)
    model = make_recursive(
        vit(depth=4, drop_path_rate=0.1, proj_drop_rate=0.1, **SIZE),
        num_blocks=2,
        num_loops=9,
        projections="per_application",
        step_size=1 / 18,
        memory=MemoryConfig(schedule="planned", budget_bytes=400_000),
    )
    names = [name for name, _ in model.named_parameters() if ".projections." in name]
    assert len({name.split(".projections.")[1].split(".")[0] for name in names}) == 18
    model(torch.randn(4, 3, 28, 28)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match="num_loops: expected no other, since each application has its projection"):
        set_loops(model, 3)


def test_timms_own_ways_see_applications() -> None:
    model, images = made("vit")
    ours = make_recursive(model, num_blocks=2, num_loops=3).eval()
    last, found = ours.forward_intermediates(images, indices=[0, 5])
    assert len(found) == 2 and torch.equal(last, ours.forward_features(images))
    expected = outcome(ours, images)
    ours.set_grad_checkpointing()
    assert all(map(torch.equal, outcome(ours, images), expected))
    # Tied weights are those of any number of loops.
    other = make_recursive(made("vit")[0], num_blocks=2, num_loops=5).eval()
    other.load_state_dict(ours.state_dict())
    set_loops(other, 3)
    assert torch.equal(other(images), ours(images))
    ours.prune_intermediate_layers([2], prune_head=False)
    assert len(recursions(ours)[0]) == 3 and ours(images).shape == (2, 5)
    again = copy.deepcopy(ours)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(images), ours(images))


def test_a_name_of_timm_makes_one() -> None:
    model = timm.create_model("recursive.deit_tiny_patch16_224", num_blocks=3, num_loops=2, img_size=32, num_classes=7)
    chain = recursions(model)[0]
    assert (len(chain), len(chain.blocks)) == (6, 3) and model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    features = timm.create_model("recursive.deit_tiny_patch16_224", num_blocks=1, num_loops=20, features_only=True)
    assert [one.shape for one in features(torch.zeros(1, 3, 224, 224))] == [(1, 192, 14, 14)] * 3
    optimizer = importlib.import_module("timm.optim").create_optimizer_v2(model, opt="adamw", lr=1.0, layer_decay=0.5)
    scales = {id(one): group["lr_scale"] for group in optimizer.param_groups for one in group["params"]}
    named = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    assert [named[f"blocks.{index}.norm1.bias"] for index in range(3)] == [0.125, 0.25, 0.5]
    assert (named["patch_embed.proj.bias"], named["head.bias"]) == (0.0625, 1.0)
    with pytest.raises(ValueError, match="recursive: expected the name of a model of timm behind the dot"):
        timm.create_model("recursive")


def test_the_page_runs() -> None:
    page = (ROOT / "docs" / "backbones.md").read_text()
    first, second, tie = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"batches": [(torch.randn(2, 3, 32, 32), torch.tensor([1, 4]))]}
    code = (first + second + tie).replace("num_loops=27", "num_loops=2").replace("1, 3, 224, 224", "1, 3, 32, 32")
    exec(code.replace('patch16_224"', 'patch16_224", img_size=32'), names)
    assert names["before"] > 0 and names["after"] > 0
    assert names["scores"].shape == (1, 1000) and len(recursions(names["model"])[0]) == 12


@pytest.mark.parametrize(
    "family, options, message",
    [
        ("vit", {"num_blocks": 3}, "num_blocks: expected a divisor of the 4 of blocks, got 3"),
        ("vit", {"num_loops": 0}, "num_loops: expected at least 1, got 0"),
        ("vit", {"at": "layers"}, "at: VisionTransformer has no chain of blocks at layers; .* its parts: patch_embed"),
        ("vit", {"init": "keep"}, "init: expected one of mean, first, got 'keep'"),
        ("swin", {}, "layers.0.blocks: blocks 0 and 1 are not alike: .*shift_size is .* needs unit=2"),
        ("convmixer", {"projections": "per_application"}, "a Sequential has no norm over the last axis, which says"),
        (
            "gmlp",
            {"conditioning": "norm_by_depth"},
            "norm_by_depth shifts LayerNorms norm1 and norm2 of a block, which",
        ),
        ("resmlp", {"conditioning": "norm_per_loop"}, "which a ResBlock lacks"),
        (
            "convmixer",
            {"memory": MemoryConfig(schedule="binomial")},
            r"memory: blocks.*updates its statistics at every run",
        ),
    ],
)
def test_what_cannot_be_is_said(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_recursive(made(family)[0], **options)


def test_a_recursive_model_is_not_made_recursive_again() -> None:
    model = make_recursive(made("vit")[0])
    with pytest.raises(ValueError, match="blocks is recursive already: `set_loops` gives it other loops"):
        make_recursive(model)


def test_a_chain_whose_shapes_change_is_refused() -> None:
    model = nn.Module()
    model.blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8))
    with pytest.raises(ValueError, match=r"blocks 0 and 1 are not alike: bias is \(4,\) and \(8,\)"):
        make_recursive(model)


@pytest.mark.lengthy
@pytest.mark.parametrize("kind", ["norm_per_loop", "norm_by_depth"])
@pytest.mark.parametrize("family", ["vit", "mixer", "cait"])
def test_conditioning_tells_a_block_its_loop(family: str, kind: Any) -> None:
    model, images = made(family)
    plain = make_recursive(copy.deepcopy(model), num_blocks=2, num_loops=3)
    told = make_recursive(copy.deepcopy(model), num_blocks=2, num_loops=3, conditioning=kind)
    assert torch.equal(told(images), plain(images))
    with torch.no_grad():
        for own in recursions(told)[0].conditioning:
            own.delta.add_(0.1 * torch.randn_like(own.delta))
        for parameter in told.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    chain = recursions(told)[0]
    # By hand: the norms of a block, moved for each loop and back.
    x = _example(told, images)
    by_hand = x
    for block, loop in chain.applications():
        moved = copy.deepcopy(chain.blocks[block])
        for i, norm in enumerate((moved.norm1, moved.norm2)):
            scale, bias = chain.conditioning[block].deltas(loop).norms[i]
            norm.weight.data += scale
            norm.bias.data += bias
        by_hand = moved(by_hand)
    torch.testing.assert_close(chain(x), by_hand)
    expected = outcome(told, images)
    chain.memory = MemoryConfig(schedule="binomial")
    assert all(map(torch.equal, outcome(told, images), expected))
    found = torch.autograd.grad(told(images).sum(), list(chain.conditioning.parameters()))
    assert all(value.abs().max() > 0 for value in found)
    if kind == "norm_by_depth":
        set_loops(told, 5)
        assert told(images).isfinite().all()
    else:
        with pytest.raises(ValueError, match="num_loops: expected no other, since each application has norms of its"):
            set_loops(told, 5)


def test_injection_adds_the_input_before_every_application() -> None:
    model, images = made("resmlp")
    chain = recursions(make_recursive(model, num_blocks=2, num_loops=2, injection="add"))[0]
    x = _example(model, images)
    state = x
    for block, _ in chain.applications():
        state = chain.blocks[block](state + x)
    assert torch.equal(chain(x), state)


@pytest.mark.parametrize("is_divided", [True, False])
def test_a_step_size_of_one_over_depth_keeps_an_update_alike(is_divided: bool) -> None:
    """The coordinate check of the scale around a whole block: how far one Adam step moves what a chain gives."""
    moves = []
    for loops in (8, 32, 96):
        torch.manual_seed(0)
        step_size = 1 / loops if is_divided else 1.0
        chain = recursions(make_recursive(vit(depth=1, **SIZE), num_loops=loops, step_size=step_size))[0]
        optimizer, x = torch.optim.Adam(chain.parameters(), lr=1e-3), torch.randn(8, 17, 16)
        before = chain(x)
        before.square().mean().backward()
        optimizer.step()
        moves.append(float((chain(x) - before).detach().square().mean().sqrt()))
    assert (max(moves) < 2 * min(moves)) == is_divided
