"""A backbone of timm as the model of a run: the function of `make_recursive`, its depths, configuration, refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from sret_scale.config.run_config import RunConfig, build, from_yaml, override, to_plain, to_yaml
from sret_scale.config.timm_config import TimmConfig, timm_config
from sret_scale.memory import MemoryConfig, prepare_memory
from sret_scale.memory.planning.instrument import measure_peak
from sret_scale.model import Noise, StackConfig, StageConfig, describe
from sret_scale.model.depth_plan import DepthPlan, StageDepth, first_loops
from sret_scale.model.read_out import read_outs
from sret_scale.model.vision.weight_files import load_model, save_model
from sret_scale.timm import import_timm, make_recursive
from sret_scale.timm.recursive import recursions
from sret_scale.timm.timm_stack import TimmModel
from sret_scale.train.telemetry.depth_probe import probe
from tests.backbone_configs import BACKBONES, TINY_MIXER, TINY_VIT, drawn

NOISE = Noise(permutation_seed=1, sample_seed=2)
SIZES = "patch_size=7&embed_dim=16&image_size=28&num_classes=5"
SPECS = {
    "vit": f"timm:VisionTransformer?{SIZES}&depth=4&num_heads=2&num_blocks=2&num_loops=3&step_size=0.5",
    "mixer": f"timm:MlpMixer?{SIZES}&timm.num_blocks=4&num_blocks=2&projections=per_application&loop_order=model",
    "cait": f"timm:Cait?{SIZES}&depth=4&num_heads=2&num_blocks=1&num_loops=2",
    "swin": "timm:SwinTransformer?patch_size=4&window_size=2&embed_dim=16&depths=[4,4]&num_heads=[2,2]&image_size=28"
    "&num_classes=5&drop_path_rate=0&unit=2&num_blocks=1&num_loops=3",
}


def images_of(config: StackConfig, count: int = 3) -> torch.Tensor:
    return torch.randn(config.example(count).shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", SPECS)
def test_it_is_the_function_of_make_recursive_to_the_bit(family: str) -> None:
    config = timm_config(SPECS[family])
    model = drawn(config)
    stage = config.stages[0]
    theirs = make_recursive(
        config.network(),
        num_blocks=stage.num_blocks,
        num_loops=stage.num_loops,
        order=stage.loop_order,
        projections=stage.projections,  # type: ignore[arg-type]
        step_size=config.step_size,
        unit=config.unit,
    )
    ours = dict(model.net.named_parameters(prefix="")) | dict(model.net.named_buffers())
    for name, tensor in theirs.named_parameters():
        if ".blocks." not in f".{name}" and not name.startswith("blocks."):
            tensor.data.copy_(ours[name])
    for chain, own in zip(recursions(theirs), model.stages, strict=True):
        for block, foreign in zip(chain.blocks, cast(Any, own).blocks, strict=True):
            block.load_state_dict(foreign.inner.state_dict())
        # Ours are called by block and loop, those of a chain stand in the order in which they run.
        for projection, (number, loop) in zip(chain.projections, chain.applications(), strict=False):
            projection.load_state_dict(own.projections[number * chain.num_loops + loop].state_dict())
    images, labels = images_of(config), torch.tensor([0, 1, 2])
    scores = [model(images), theirs(images)]
    assert torch.equal(*scores)
    sums = [F.cross_entropy(one, labels) for one in scores]
    of_model = torch.autograd.grad(sums[0], model.stages[0].blocks[0].inner.parameters())
    of_theirs = torch.autograd.grad(sums[1], list(recursions(theirs)[0].blocks[0].parameters()))
    assert all(map(torch.equal, of_model, of_theirs))
    assert len(set(model.state_dict())) == len({value.data_ptr() for value in model.state_dict().values()})


@pytest.mark.parametrize("kind", BACKBONES)
def test_fewer_loops_are_the_model_that_has_them_to_the_bit(kind: str) -> None:
    model = drawn(BACKBONES[kind]).eval()
    images = images_of(model.config)
    planned = model(images, plans=[first_loops(model.config, [2])])
    assert torch.equal(planned[0], model.with_loops(2)(images))
    deeper = model.with_loops(9)
    assert deeper.config.num_applications == 18 and deeper(images).isfinite().all()


def test_scores_on_the_way_are_those_of_as_many_loops() -> None:
    # Conditioning and projections know how deep the whole pass is; in the order A A B B two loops are another pass.
    plain = replace(TINY_MIXER.stages[0], conditioning="none", projections="none")
    model = drawn(replace(TINY_MIXER, stages=(plain,))).eval()
    images = images_of(model.config)
    for read in read_outs(model, images, [1, 3]):
        plan = first_loops(model.config, [read.loops])
        torch.testing.assert_close(read.last, model(images, plans=[plan])[0])


@pytest.mark.parametrize("kind", BACKBONES)
def test_detached_loops_leave_the_scores_as_they_are(kind: str) -> None:
    model = drawn(replace(BACKBONES[kind], drop_path=0.0)).train()
    images, most = images_of(model.config), model.config.stages[0].num_loops
    scores = model(images, NOISE, [DepthPlan((StageDepth(tuple(range(most)), 1),), (2,))])
    torch.testing.assert_close(scores[1], model(images, NOISE))
    assert scores.shape == (2, 3, 10)
    ours = torch.autograd.grad(scores[1].square().sum(), list(model.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(model(images, NOISE).square().sum(), list(model.parameters()), allow_unused=True)
    assert any(a is not None and not torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_drop_path_leaves_a_whole_block_out_and_repeats_with_its_seed() -> None:
    model = drawn(replace(TINY_VIT, drop_path=0.9, step_size=1.0)).train()
    images = images_of(model.config, 8)
    assert torch.equal(model(images, NOISE), model(images, NOISE))
    assert not torch.equal(model(images, NOISE), model(images, replace(NOISE, sample_seed=3)))
    assert torch.equal(model(images), model.eval()(images, NOISE))


@pytest.mark.lengthy
@pytest.mark.parametrize("kind", BACKBONES)
def test_the_planner_keeps_a_budget_with_the_same_gradients(kind: str) -> None:
    config = replace(BACKBONES[kind], drop_path=0.0)
    model = drawn(config).train()
    images = images_of(config, 8)

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(images, NOISE).square().sum(), list(model.parameters())))

    expected = gradients()
    free = prepare_memory(model, MemoryConfig(schedule="none"), micro_batch_size=8).activations
    measured = measure_peak(model.parameters(), lambda: model(images, NOISE).square().sum().backward())
    assert free == pytest.approx(measured, rel=0.1)
    state = 4 * sum(parameter.numel() for parameter in model.parameters())
    budget = 4 * state + free // 2
    prepared = prepare_memory(model, MemoryConfig(schedule="planned", budget_bytes=budget), micro_batch_size=8)
    assert prepared.plan is not None and prepared.plan.total_bytes <= budget and prepared.activations < free
    peak = measure_peak(model.parameters(), lambda: model(images, NOISE).square().sum().backward())
    assert peak <= 1.1 * prepared.activations
    assert all(map(torch.equal, gradients(), expected))


def test_telemetry_reads_attention_where_it_is_like_ours() -> None:
    others = [timm_config(SPECS[name]) for name in ("cait", "swin")]
    for config in (TINY_VIT, TINY_MIXER, *others):
        is_readable = config is TINY_VIT
        model = drawn(config).train()
        blocks = probe(model, images_of(config), lambda scores: scores.square().mean(), NOISE, "fp32")
        for block in blocks:
            entropies = block.values["attention_entropy"]
            assert all((value == value) == is_readable for value in entropies)
            assert all(value > 0 for value in block.values["gradient_norm"])
        loops = [one.num_loops for one in config.stages for _ in range(one.num_blocks)]
        assert [len(block.values["rms"]) for block in blocks] == loops


@pytest.mark.parametrize("kind", ["input_add", "input_gated", "input_tied"])
def test_the_input_of_a_chain_is_injected_before_every_block(kind: Any) -> None:
    stage = replace(TINY_VIT.stages[0], conditioning=kind, projections="none")
    model: Any = drawn(replace(TINY_VIT, stages=(stage,), step_size=1.0)).eval()
    x = state = torch.randn(3, 17, 16)
    for block in model.stages[0].blocks:
        for loop in range(stage.num_loops):
            state = block.inner(block.conditioning(state, x, loop))
    torch.testing.assert_close(model.run_stage(0, x), state)


PIXELS = "patch_size=1&embed_dim=16&image_size=5&num_classes=3&head=tokens"
TOKENS = {
    "vit": f"timm:VisionTransformer?{PIXELS}&depth=4&num_heads=2&class_token=false&num_blocks=2",
    "mixer": f"timm:MlpMixer?{PIXELS}&timm.num_blocks=4&num_blocks=1",
}


@pytest.mark.parametrize("family", TOKENS)
def test_a_token_head_scores_every_pixel_where_it_lies(family: str) -> None:
    model = drawn(timm_config(TOKENS[family]))
    images = images_of(model.config)
    scores = model(images)
    features = model.forward_features(images)
    for row, column in ((0, 0), (1, 3), (4, 2)):
        expected = features[:, 5 * row + column] @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(scores[:, :, row, column], expected)
    assert torch.equal(scores, model.forward_head(features)) and scores.shape == (3, 3, 5, 5)
    planned = model(images, plans=[first_loops(model.config, [1])])
    assert planned.shape == (1, 3, 3, 5, 5)
    # Blocks that change nothing leave every score to its own pixel.
    still = drawn(replace(timm_config(TOKENS[family]), step_size=0.0))
    (slope,) = torch.autograd.grad(still(images.requires_grad_())[:, :, 1, 3].sum(), images)
    assert slope.abs().sum(dim=(0, 1)).nonzero().tolist() == [[1, 3]]
    counts = describe(timm_config(TOKENS[family]))
    assert counts["macs"] - counts["macs_published"] == 25 * 3 * 16


def test_every_parameter_has_a_tag_and_vectors_do_not_decay() -> None:
    for config in BACKBONES.values():
        model = config.build()
        tags = model.parameter_tags()
        assert tags.keys() == dict(model.named_parameters()).keys()
        assert tags["net.head.weight"].kind == "head" and tags["net.head.weight"].layer == 3
        decaying = {name for name, tag in tags.items() if tag.decay}
        assert "stages.0.blocks.0.inner.norm1.weight" not in decaying and "net.pos_embed" not in decaying
        assert "stages.0.blocks.1.inner.norm2.bias" in tags and "net.head.weight" in decaying


def test_a_configuration_reads_back_and_its_stages_change(tmp_path: Path) -> None:
    spec = SPECS["vit"]
    config = override(RunConfig(), [f"model={spec}", "model.num_loops=5", "train.seed=3"])
    assert isinstance(config.model, TimmConfig) and config.model.stages[0].num_loops == 5
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert from_yaml(tmp_path / "run.yaml") == config
    (tmp_path / "short.yaml").write_text(f"model: '{spec}'\n")
    assert from_yaml(tmp_path / "short.yaml").model == timm_config(spec)
    model = drawn(config.model)
    save_model(model, tmp_path / "weights.safetensors")
    again = load_model(tmp_path / "weights.safetensors")
    images = images_of(config.model)
    assert again.config == config.model and torch.equal(again(images), model.eval()(images))


@pytest.mark.lengthy
def test_counts_are_those_of_the_network() -> None:
    counts = describe(timm_config(SPECS["vit"]))
    tokens, width = 17, 16
    linear, attention = tokens * 12 * width * width, 2 * tokens * tokens * width
    assert counts["macs"] == 6 * (linear + attention) + 16 * 3 * 49 * width + width * 5
    assert counts["macs_published"] == counts["macs"] - width * 5
    assert (counts["applications"], counts["residual_sublayers"], counts["weight_layers"]) == (6, 12, 24)
    assert all(describe(timm_config(spec))["macs"] > 0 for spec in SPECS.values())
    projected = describe(timm_config(f"{SPECS['vit']}&projections=per_block"))
    assert projected["macs"] - counts["macs"] == 6 * tokens * 2 * width * width


def test_trained_weights_of_the_untied_network_become_means(tmp_path: Path) -> None:
    config = timm_config(SPECS["vit"])
    net = config.network()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    model = config.build(tmp_path / "net.pth")
    found = model.state_dict()["stages.0.blocks.1.inner.mlp.fc1.weight"]
    torch.testing.assert_close(found, (net.blocks[2].mlp.fc1.weight + net.blocks[3].mlp.fc1.weight) / 2)
    with pytest.raises(ValueError, match=r"net\.pth does not fit VisionTransformer"):
        replace(config, arguments=("patch_size=7", "embed_dim=32", "depth=4", "num_heads=2")).build(
            tmp_path / "net.pth"
        )


def stage(**options: Any) -> tuple[StageConfig, ...]:
    return (replace(TINY_VIT.stages[0], **options),)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("timm:deit_tinny_patch16_224", "timm has no model 'deit_tinny_patch16_224'; did you mean deit_tiny"),
        (
            f"{SPECS['vit']}&num_loop=3",
            "'num_loop'; keys of ours: num_blocks, num_loops, ",
        ),
        (SPECS["vit"].replace("num_loops=3", "num_loops=0"), "num_loops must be a whole number of at least 1, got 0"),
        (f"{SPECS['vit']}&at=layers", "at: VisionTransformer has no chain of blocks at layers"),
        (f"{SPECS['vit']}&groups=4", "unexpected keyword argument 'groups'"),
        ("timm:deit_tiny_patch16_224?checkpoint_path=net.pth", "checkpoint_path is not taken: weights are given by"),
        ("timm:deit_tiny_patch16_224?timm.pretrained=true", "pretrained is not taken"),
        ("timm:hf-hub:someone/model", "timm has no model 'hf-hub:someone/model'"),
        ("timm:OrderedDict", "timm has no model 'OrderedDict'"),
        ("timm:deit_tiny_patch16_224?num_blocks", "expected key=value, each once, got 'num_blocks' without a value"),
        ("timm:deit_tiny_patch16_224?unit=1&unit=2", "each once, got 'unit' without a value or twice"),
        ("timm:deit_tiny_patch16_224?num_blocks=abc", "num_blocks must be a whole number of at least 1, got 'abc'"),
        ("timm:deit_tiny_patch16_224?depth=0", "blocks has no blocks"),
        ("timm:MlpMixer?embed_dim=16&timm.embed_dim=8", "with and without `timm.`: give it once"),
        ("timm:mixer_s16_224?img_size=32", "img_size is image_size here: give that"),
        ("timm:resnet18", "at: ResNet has no chain of blocks"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm_config(spec)


@pytest.mark.parametrize(
    "config, message",
    [
        (replace(TINY_VIT, stages=stage(num_blocks=3)), "num_blocks: expected a divisor of the 4 of blocks, got 3"),
        (
            replace(TINY_VIT, head="tokens"),
            r"head=tokens: expected a token for each of 28 x 28 pixels, got \(17,\) of VisionTransformer: set patch_",
        ),
        (replace(TINY_VIT, stages=stage(width=8)), r"model.stages.0.width: expected 16, that of blocks, got 8"),
        (replace(TINY_VIT, stages=2 * stage()), "stages: expected one for each of blocks, got 2"),
        (replace(TINY_VIT, stages=stage(conditioning="low_rank")), "conditioning: low_rank changes layers of SReT's"),
        (replace(TINY_VIT, arguments=(*TINY_VIT.arguments, "proj_drop_rate=0.1")), "would draw again when its block"),
        (replace(timm_config(SPECS["swin"]), unit=1), "blocks 0 and 1 are not alike: .*needs unit=2"),
        (
            TimmConfig(
                name="ConvMixer",
                arguments=("dim=16", "depth=4", "kernel_size=3", "patch_size=7"),
                stages=stage(),
                image_size=28,
            ),
            r"of ConvMixer \(BatchNorm2d\) counts every run of a block",
        ),
        (
            TimmConfig(
                name="Eva",
                arguments=("patch_size=7", "embed_dim=16", "depth=4", "num_heads=2", "use_rot_pos_emb=true"),
                stages=stage(),
                image_size=28,
            ),
            "Eva goes through its blocks itself, with arguments of its own",
        ),
    ],
)
def test_what_a_run_cannot_train_is_refused(config: TimmConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.build()(config.example(1))


def test_statistics_of_a_batch_are_refused() -> None:
    """Those of a tied block would be of all its loops together, and count each run of it."""
    net = import_timm().models.ConvMixer(dim=16, depth=4, kernel_size=3, patch_size=7, num_classes=10)
    with pytest.raises(ValueError, match=r"of ConvMixer \(BatchNorm2d\) counts every run of a block"):
        TimmModel(TINY_VIT, make_recursive(net), step_size=1.0)


def test_fields_of_our_own_blocks_are_refused() -> None:
    for name, value in (("groups", [4]), ("norm_placement", "deepnorm")):
        plain = to_plain(TINY_VIT)
        plain["stages"][0][name] = value
        with pytest.raises(ValueError, match=f"{name} is of SReT's blocks, not of timm's"):
            build(TimmConfig, plain, "model")
    with pytest.raises(ValueError, match="dropout is of SReT's blocks"):
        replace(TINY_VIT, dropout=0.1)
