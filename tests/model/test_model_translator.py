"""The translator: torch's own layers, masks by gradients, rows of several pairs, the same bits when recomputed."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_scale.memory import MemoryConfig, apply_recomputation, prepare_memory
from sret_scale.memory.planning.instrument import measure_peak
from sret_scale.model import Noise, StageConfig, TranslationConfig, describe
from sret_scale.model.config import LoopOrder
from sret_scale.model.depth_plan import first_loops
from sret_scale.model.text.translator import Translator, place_in_pair
from sret_scale.train.telemetry.depth_probe import probe

NOISE = Noise(permutation_seed=3, sample_seed=4)
# Three pairs of source and target, tokens of 1 to 19; token 0 begins a target.
PAIRS = [([3, 5, 7], [4, 6]), ([9, 2], [8, 1, 3]), ([11], [19, 12])]


def config(**fields: Any) -> TranslationConfig:
    """10 tokens of context, 20 different ones; fields of the stages are told from those of the model by their names."""
    of_stage = {"width": 8, "num_heads": 2, "num_blocks": 2, "num_loops": 2, "mlp_ratio": 2.0}
    of_model = {name: fields.pop(name) for name in list(fields) if name in TranslationConfig.__dataclass_fields__}
    stage = StageConfig(**{**of_stage, **fields})
    return TranslationConfig(**{"stages": (stage, stage), "context": 10, "vocabulary": 20, **of_model})


def built(model_config: TranslationConfig) -> Translator:
    torch.manual_seed(1)
    model = model_config.build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def row(*pairs: tuple[list[int], list[int]]) -> Tensor:
    """(4, 11)."""
    found = torch.zeros(4, 11, dtype=torch.int64)
    ends = [0, 0]
    for number, (source, target) in enumerate(pairs, start=1):
        for side, tokens in enumerate((source, [0, *target])):
            place = slice(ends[side], ends[side] + len(tokens))
            found[2 * side, place], found[2 * side + 1, place] = torch.tensor(tokens), number
            ends[side] = place.stop
    return found


def test_a_row_of_pairs_is_each_pair_alone() -> None:
    model = built(config())
    together = model(row(*PAIRS)[None])[0]
    alone = model(torch.stack([row(pair) for pair in PAIRS]))
    start = 0
    for number, (_, target) in enumerate(PAIRS):
        torch.testing.assert_close(
            together[start : start + 1 + len(target)], alone[number, : 1 + len(target)], rtol=0, atol=1e-10
        )
        start += 1 + len(target)
    assert together.isfinite().all() and alone.isfinite().all()


def copied(theirs: Any, ours: Any, *, is_decoder: bool) -> None:
    """A block's weights into torch's layer."""
    attention, feed_forward = ours.attention, ours.feed_forward
    pairs = {
        theirs.self_attn.in_proj_weight: attention.qkv.weight,
        theirs.self_attn.in_proj_bias: attention.qkv.bias,
        theirs.norm1.weight: ours.norm1.weight,
        theirs.norm1.bias: ours.norm1.bias,
    }
    modules = [(theirs.self_attn.out_proj, attention.out), (theirs.linear1, feed_forward.fc1)]
    modules += [(theirs.linear2, feed_forward.fc2), (theirs.norm3 if is_decoder else theirs.norm2, ours.norm2)]
    if is_decoder:
        modules += [(theirs.multihead_attn.out_proj, ours.cross.out), (theirs.norm2, ours.cross.norm)]
    for their, our in modules:
        pairs |= {their.weight: our.weight, their.bias: our.bias}
    with torch.no_grad():
        for to, of in pairs.items():
            to.copy_(of)


def torch_layers(model: Translator) -> tuple[list[nn.Module], list[nn.Module]]:
    stage = model.config.stages[0]
    options: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    options |= {"layer_norm_eps": 1e-6, "dtype": torch.float64}
    sizes = stage.width, stage.num_heads, stage.hidden_width
    encoder: list[Any] = [nn.TransformerEncoderLayer(*sizes, **options) for _ in range(2)]
    decoder: list[Any] = [nn.TransformerDecoderLayer(*sizes, **options) for _ in range(2)]
    stages: Any = model.stages
    for number in range(2):
        copied(encoder[number], stages[0].blocks[number], is_decoder=False)
        copied(decoder[number], stages[1].blocks[number], is_decoder=True)
        made, block, cross = stages[1].memory[number], stages[1].blocks[number], decoder[number].multihead_attn
        with torch.no_grad():
            cross.in_proj_weight.copy_(torch.cat([block.cross.query.weight, made.weight]))
            cross.in_proj_bias.copy_(torch.cat([block.cross.query.bias, made.bias]))
    return encoder, decoder


@pytest.mark.parametrize("loop_order", get_args(LoopOrder))
def test_it_is_torchs_encoder_and_decoder_gradients_included(loop_order: str) -> None:
    """Padding, causal and memory masks too: one pair a row, of three lengths."""
    model = built(config(projections="none", branch_scheme="published", loop_order=loop_order))
    for name, parameter in model.named_parameters():
        if "residual" in name:
            parameter.data.fill_(1.0)
    encoder, decoder = torch_layers(model)
    inputs = torch.stack([row(pair) for pair in PAIRS])
    source_RS, source_pair_RS, target_RN, target_pair_RN = inputs[..., :-1].unbind(1)
    is_padding_RS, counted_RN = source_pair_RS == 0, target_pair_RN > 0
    order = {"block": [0, 0, 1, 1], "model": [0, 1, 0, 1], "model_reversed": [0, 1, 1, 0]}[loop_order]
    memory = model.stem(source_RS) + model.position[0]
    for number in order:
        memory = encoder[number](memory, src_key_padding_mask=is_padding_RS)
    memory, x_RND = model.memory_norm(memory), model.stem(target_RN) + model.position[1]
    causal = nn.Transformer.generate_square_subsequent_mask(10, dtype=torch.float64)
    for number in order:
        x_RND = decoder[number](x_RND, memory, tgt_mask=causal, memory_key_padding_mask=is_padding_RS)
    scores_RNV = F.linear(model.norm(x_RND), model.stem.weight)
    theirs = F.cross_entropy(scores_RNV.transpose(1, 2), inputs[:, 2, 1:], reduction="none")[counted_RN]
    ours = model(inputs)[counted_RN]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    shared = [model.stem.weight, model.position, model.norm.weight, model.memory_norm.weight]
    stages: Any = model.stages
    for number in range(2):
        layers: Any = (encoder[number], decoder[number])
        for stage, layer in zip(stages, layers, strict=True):
            block = stage.blocks[number]
            pairs = [(block.attention.qkv.weight, layer.self_attn.in_proj_weight)]
            pairs += [(block.feed_forward.fc1.weight, layer.linear1.weight)]
            for one, other in pairs:
                gradients = torch.autograd.grad(ours.mean(), one, retain_graph=True)
                torch.testing.assert_close(
                    gradients, torch.autograd.grad(theirs.mean(), other, retain_graph=True), rtol=0, atol=1e-10
                )
        query, made = stages[1].blocks[number].cross.query.weight, stages[1].memory[number].weight
        of_cross = torch.cat(torch.autograd.grad(ours.mean(), [query, made], retain_graph=True))
        their_weight = layers[1].multihead_attn.in_proj_weight
        (expected,) = torch.autograd.grad(theirs.mean(), their_weight, retain_graph=True)
        torch.testing.assert_close(of_cross, expected, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(nats.mean(), shared, retain_graph=True) for nats in (ours, theirs)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("noise", [None, NOISE])
def test_no_token_sees_a_later_one_nor_another_pair(noise: Noise | None) -> None:
    """By gradients, from every token of the targets to both sides of the row."""
    model = built(config(num_loops=3, loop_order="model", conditioning="input_gated"))
    inputs = row(*PAIRS)[None]
    first = model.forward_stem(inputs)
    source, target = (one.detach().requires_grad_() for one in (first.source, first.target))
    *_, last_RND = model.planned_outputs(first._replace(source=source, target=target), noise, None)
    source_pair, target_pair = inputs[0, 1, :-1], inputs[0, 3, :-1]
    for place in range(int((target_pair > 0).sum())):
        gradients = torch.autograd.grad(last_RND[0, place].square().sum(), [source, target], retain_graph=True)
        seen_source, seen_target = (one[0].abs().sum(dim=1) > 0 for one in gradients)
        assert torch.equal(seen_source, source_pair == target_pair[place])
        assert torch.equal(seen_target, (target_pair == target_pair[place]) & (torch.arange(10) <= place))


OPTIONS: list[dict[str, Any]] = [
    {"dropout": 0.1, "drop_path": 0.2},
    {"loop_order": "model", "conditioning": "input_gated"},
    {"loop_order": "model_reversed"},
    {"conditioning": "norm_per_loop", "projections": "per_block", "norm_placement": "outer"},
]


@pytest.mark.lengthy
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("schedule", ["none", "per_application", "binomial"])
def test_recomputation_gives_the_same_bits(schedule: Any, options: dict[str, Any]) -> None:
    """Keys and values of the memory come into the decoder's chain from a history that leads to the embedding too."""
    models, inputs = [built(config(num_loops=4, **options)).train() for _ in range(2)], row(*PAIRS)[None]
    apply_recomputation(models[1], MemoryConfig(schedule=schedule))
    grads = [torch.autograd.grad(model(inputs, NOISE).mean(), list(model.parameters())) for model in models]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    plans = [first_loops(models[0].config, [2, 3])]
    for model in models:
        model.zero_grad()
        model(inputs, NOISE, plans).mean().backward()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)


@pytest.mark.lengthy
def test_the_planner_knows_both_sides() -> None:
    """What it predicts of a step's activations is what the instrument measures, keys of the memory included."""
    chosen = config(width=32, num_heads=2, num_loops=6, context=32, projections="none", loop_order="model_reversed")
    for schedule in ("none", "binomial"):
        model = chosen.build().train()
        memory = MemoryConfig(schedule=schedule)
        predicted = prepare_memory(model, memory, micro_batch_size=4).activations
        inputs = chosen.example(4)

        def step(model: Translator = model, inputs: Tensor = inputs) -> None:
            model(inputs, NOISE).mean().backward()

        step()
        measured = measure_peak(model.parameters(), step)
        assert predicted == pytest.approx(measured, rel=0.1), schedule


def test_telemetry_looks_at_both_sides_and_their_gradients_are_those_of_the_model() -> None:
    model, inputs = built(config()).train(), row(*PAIRS)[None]
    uses = probe(model, inputs, lambda nats: nats.mean(), NOISE, "fp32")
    assert [(use.stage, use.block) for use in uses] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(value > 0 for use in uses for value in use.values["gradient_norm"])
    assert all(0 < value <= 1 for use in uses for value in use.values["attention_entropy"])
    assert "alpha3" in uses[2].coefficients and "alpha3" not in uses[0].coefficients


def test_keys_of_the_memory_are_made_once_whatever_the_loops() -> None:
    model, calls = built(config(num_loops=7)), []
    for made in model.stages[1].memory:
        made.register_forward_hook(lambda *_: calls.append(1))
    model(row(*PAIRS)[None])
    assert len(calls) == 2 and not model.stages[0].memory


def test_places_begin_anew_in_each_pair() -> None:
    assert place_in_pair(torch.tensor([[1, 1, 2, 2, 2, 0, 0], [3, 0, 0, 0, 0, 0, 0]])).tolist() == [
        [0, 1, 0, 1, 2, 0, 1],
        [0, 0, 1, 2, 3, 4, 5],
    ]


def test_counts_and_depths_are_those_of_the_model() -> None:
    one = config(projections="none")
    counts, model = describe(one), built(one)
    linear = 4 * 8 * 8 + 2 * 8 * 16
    encoder, cross = 10 * (4 * linear + 4 * 2 * 8 * 10), 10 * (4 * (2 * 8 * 8 + 2 * 8 * 10) + 2 * 2 * 8 * 8)
    assert counts["macs"] == 2 * encoder + cross + 10 * 8 * 20
    assert counts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    inputs = row(*PAIRS)[None]
    both = model(inputs, None, [first_loops(one, [1, 1]), first_loops(one, [2, 2])])
    assert torch.equal(both[0], model.with_loops(1)(inputs)) and torch.equal(both[1], model(inputs))
    assert model.parameter_tags()["stages.1.memory.0.weight"].kind == "tied"
    assert model.parameter_tags()["stages.1.blocks.0.residual_cross.beta"].kind == "residual"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": (2,)}, r"stage 0: sentences share rows and are not sliced: set groups=\[1\]"),
        ({"encoder_stages": 2}, "encoder_stages: expected 1 to 1 of 2 stages"),
        ({"encoder_stages": 0}, "encoder_stages: expected 1 to 1 of 2 stages"),
        ({"vocabulary": 0}, "vocabulary must be a whole number of at least 1"),
        ({"norm_placement": "deepnorm"}, "stage 0: norm_placement 'deepnorm' has no constants for three sub-layers"),
    ],
)
def test_bad_configs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_rows_beyond_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes rows of 1 \+ 9 tokens at most, got 1 \+ 10"):
        built(replace(config(), context=9))(row(*PAIRS)[None])
