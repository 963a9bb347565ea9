"""The language model: torch's own layers, causality by gradients, slices that ascend, losses in chunks, bad configs."""

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_scale.memory import MemoryConfig, prepare_memory
from sret_scale.model import Noise, StageConfig, TextConfig, describe
from sret_scale.model.config import LoopOrder
from sret_scale.model.depth_plan import first_loops
from sret_scale.model.permutation import ascending_slices, strided_order
from sret_scale.model.text import token_model
from sret_scale.model.text.next_byte import NextByte

NOISE = Noise(permutation_seed=3, sample_seed=4)


def config(**fields: Any) -> TextConfig:
    """8 bytes of context; fields of the stage are told from those of the model by their names."""
    of_stage = {"width": 8, "num_heads": 2, "num_blocks": 2, "num_loops": 2, "mlp_ratio": 2.0}
    of_model = {name: fields.pop(name) for name in list(fields) if name in TextConfig.__dataclass_fields__}
    return TextConfig(stages=(StageConfig(**{**of_stage, **fields}),), **{"context": 8, **of_model})


def built(model_config: TextConfig) -> NextByte:
    torch.manual_seed(1)
    model = model_config.build().double()
    assert isinstance(model, NextByte)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def rows(batch: int = 3, context: int = 8) -> Tensor:
    return F.pad(torch.randint(0, 256, (batch, context), generator=torch.Generator().manual_seed(5)), (1, 0))


def torch_layer(model: NextByte, block: Any) -> nn.TransformerEncoderLayer:
    """torch's layer with a block's weights."""
    stage = model.config.stages[0]
    layer = nn.TransformerEncoderLayer(
        stage.width,
        stage.num_heads,
        stage.hidden_width,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
        layer_norm_eps=1e-6,
        dtype=torch.float64,
    )
    attention, feed_forward = block.attention, block.feed_forward
    pairs = {
        layer.self_attn.in_proj_weight: attention.qkv.weight,
        layer.self_attn.in_proj_bias: attention.qkv.bias,
        layer.self_attn.out_proj.weight: attention.out.weight,
        layer.self_attn.out_proj.bias: attention.out.bias,
        layer.linear1.weight: feed_forward.fc1.weight,
        layer.linear1.bias: feed_forward.fc1.bias,
        layer.linear2.weight: feed_forward.fc2.weight,
        layer.linear2.bias: feed_forward.fc2.bias,
        layer.norm1.weight: block.norm1.weight,
        layer.norm1.bias: block.norm1.bias,
        layer.norm2.weight: block.norm2.weight,
        layer.norm2.bias: block.norm2.bias,
    }
    with torch.no_grad():
        for theirs, ours in pairs.items():
            theirs.copy_(ours)
    return layer


@pytest.mark.parametrize("loop_order", get_args(LoopOrder))
def test_it_is_torchs_encoder_with_a_causal_mask_gradients_included(loop_order: str) -> None:
    model = built(config(projections="none", branch_scheme="published", loop_order=loop_order))
    for name, parameter in model.named_parameters():
        if "residual" in name:
            parameter.data.fill_(1.0)
    blocks: Any = model.stages[0].blocks
    layers = [torch_layer(model, block) for block in blocks]
    inputs, mask = rows(), nn.Transformer.generate_square_subsequent_mask(8, dtype=torch.float64)
    x_BND = model.stem(inputs[:, :-1]) + model.position
    order = {"block": [0, 0, 1, 1], "model": [0, 1, 0, 1], "model_reversed": [0, 1, 1, 0]}[loop_order]
    for number in order:
        x_BND = layers[number](x_BND, src_mask=mask, is_causal=True)
    scores_BNV = F.linear(model.norm(x_BND), model.stem.weight)
    nats_BN = F.cross_entropy(scores_BNV.transpose(1, 2), inputs[:, 1:], reduction="none")
    torch.testing.assert_close(model(inputs), nats_BN, rtol=0, atol=1e-10)
    shared = [model.stem.weight, model.position, model.norm.weight, model.norm.bias]
    inner = [weight for layer in layers for weight in (layer.self_attn.in_proj_weight, layer.linear1.weight)]
    theirs = torch.autograd.grad(nats_BN.mean(), [*shared, *inner])
    inner = [weight for block in blocks for weight in (block.attention.qkv.weight, block.feed_forward.fc1.weight)]
    ours = torch.autograd.grad(model(inputs).mean(), [*shared, *inner])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.lengthy
@pytest.mark.parametrize("permutation", ["fixed", "random", "strided"])
@pytest.mark.parametrize("groups", [(1,), (2,), (4, 2), (2, 4, 1), (4, 1, 2)])
@pytest.mark.parametrize("loop_order", get_args(LoopOrder))
def test_no_byte_sees_a_later_one(permutation: str, groups: tuple[int, ...], loop_order: str) -> None:
    """By gradients: with the noise of a step, in evaluation, and in fewer loops."""
    options: dict[str, Any] = {"conditioning": "input_gated"} if loop_order == "model" else {}
    chosen = config(permutation=permutation, groups=groups, loop_order=loop_order, num_loops=5, **options)
    model = built(chosen)
    for noise, plan in ((NOISE, None), (None, None), (NOISE, first_loops(chosen, [3]))):
        torch.manual_seed(2)
        first_BND = torch.randn(1, 8, 8, dtype=torch.float64, requires_grad=True)
        *_, last_BND = model.planned_outputs(first_BND, noise, plan)
        for place in range(8):
            (grad_BND,) = torch.autograd.grad(last_BND[0, place].square().sum(), first_BND, retain_graph=True)
            seen_N = grad_BND[0].abs().sum(dim=1) > 0
            assert seen_N[place] and not seen_N[place + 1 :].any()
            if set(groups) == {1}:
                assert seen_N[: place + 1].all()


def test_two_strided_loops_reach_what_contiguous_ones_do_not() -> None:
    """Loop 0 in contiguous slices of 4, loop 1 in every second byte: the last byte sees all but those whose way would
    lead forward; with contiguous slices alone it sees its own slice."""
    reach = {}
    for start in (1, 9):
        model = built(
            config(permutation="strided", groups=(2,), permute_from_loop=start, num_blocks=1, projections="none")
        )
        first_BND = torch.randn(1, 8, 8, dtype=torch.float64, requires_grad=True)
        *_, last_BND = model.planned_outputs(first_BND, None, None)
        (grad_BND,) = torch.autograd.grad(last_BND[0, 7].square().sum(), first_BND)
        reach[start] = (grad_BND[0].abs().sum(dim=1) > 0).nonzero().flatten().tolist()
    assert reach == {1: [0, 1, 2, 3, 4, 5, 6, 7], 9: [4, 5, 6, 7]}


def test_orders_ascend_in_their_slices() -> None:
    assert strided_order(6, 2).tolist() == [0, 2, 4, 1, 3, 5]
    assert ascending_slices(torch.tensor([5, 1, 3, 0, 4, 2]), 2).tolist() == [1, 3, 5, 0, 2, 4]


def test_probabilities_of_the_next_byte_sum_to_one_and_give_the_nats() -> None:
    model, inputs = built(config()), rows(1)
    log_BNV = model.forward_head(model.forward_features(inputs)).log_softmax(dim=-1)
    torch.testing.assert_close(log_BNV.exp().sum(dim=-1), torch.ones(1, 8, dtype=torch.float64))
    nats_BN = -log_BNV.gather(2, inputs[:, 1:, None])[..., 0]
    torch.testing.assert_close(model(inputs), nats_BN, rtol=0, atol=1e-12)
    assert abs(config(width=64).build()(rows()).mean().item() - math.log(256)) < 0.2


def test_scores_of_a_micro_batch_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of 5 of 24 tokens: as in one, gradients included, and no tensor of scores has more."""
    model, inputs, sizes = built(config()), rows(), []
    whole = torch.autograd.grad(model(inputs).sum(), list(model.parameters()))
    monkeypatch.setattr(token_model, "CHUNK_TOKENS", 5)
    model.head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    parts = torch.autograd.grad(model(inputs).sum(), list(model.parameters()))
    # Forward, and again backward.
    assert sorted(sizes) == sorted(2 * [5, 5, 5, 5, 4])
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.lengthy
@pytest.mark.parametrize("schedule", ["per_application", "binomial"])
def test_recomputation_gives_the_same_bits(schedule: Any) -> None:
    chosen = config(permutation="strided", groups=(2,), num_loops=4, dropout=0.1)
    models, inputs = [built(chosen).train() for _ in range(2)], rows()
    prepare_memory(models[1], MemoryConfig(schedule=schedule), micro_batch_size=3)
    for parameter, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(parameter, other)
    grads = [torch.autograd.grad(model(inputs, NOISE).mean(), list(model.parameters())) for model in models]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_plans_are_models_of_fewer_loops_and_more_loops_begin_as_the_trained_ones() -> None:
    model, inputs = built(config(projections="per_block")), rows()
    both = model(inputs, None, [first_loops(model.config, [1]), first_loops(model.config, [2])])
    assert torch.equal(both[0], model.with_loops(1)(inputs)) and torch.equal(both[1], model(inputs))
    deeper = model.with_loops(5)
    assert deeper.config.num_applications == 10
    assert torch.equal(deeper.stem.weight, model.stem.weight) and torch.equal(deeper.position, model.position)


def test_several_stages_are_prelude_core_and_coda() -> None:
    once = StageConfig(width=8, num_heads=2, num_blocks=1, num_loops=1)
    model = built(TextConfig(context=8, stages=(once, replace(once, num_loops=3), once)))
    model(rows()).mean().backward()
    assert model.config.num_applications == 5 and all(parameter.grad is not None for parameter in model.parameters())
    tags = model.parameter_tags()
    assert tags["stem.weight"].decay and tags["stem.weight"].kind == "stem" and not tags["position"].decay


def test_counts_are_those_of_the_model() -> None:
    counts = describe(config(groups=(2, 1), projections="none"))
    linear = 4 * 8 * 8 + 2 * 8 * 16
    assert counts["macs"] == 8 * (4 * linear + 2 * (8 * 4 + 8 * 8)) + 8 * 8 * 256
    assert counts["parameters"] == sum(one.numel() for one in config(projections="none").build().parameters())
    with pytest.raises(ValueError, match="an image size is for models of images"):
        describe(config(), 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": (3,)}, "stage 0: 3 groups do not divide a context of 8 bytes"),
        ({"context": 0}, "context must be a whole number of at least 1"),
        ({"slices": "windows"}, "stage 0: slices 'windows' is for images"),
        ({"padded": True}, "padded is for models of images"),
        ({"num_loops": 0}, "num_loops must be a whole number of at least 1"),
        ({"kind": "vision"}, "kind must be 'language' here, got 'vision'"),
    ],
)
def test_bad_configs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_stages_of_other_widths_and_rows_of_other_lengths_are_refused() -> None:
    stages = tuple(StageConfig(width=width, num_heads=2, num_blocks=1) for width in (8, 16))
    with pytest.raises(ValueError, match=r"have one width, got \[8, 16\]"):
        TextConfig(stages=stages)
    with pytest.raises(ValueError, match=r"takes rows of 1 \+ 8 bytes, got 1 \+ 7"):
        built(config())(rows(context=7))
