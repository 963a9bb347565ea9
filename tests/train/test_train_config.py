"""The configuration: strict YAML, overrides, and errors that name the key."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sret_scale.config.fields import fields_of
from sret_scale.config.image_counts import describe_counts
from sret_scale.config.recipes import RECIPES, configuration, recipe
from sret_scale.config.run_config import (
    RunConfig,
    build,
    differences,
    from_yaml,
    override,
    parse_yaml,
    to_plain,
    to_yaml,
)
from sret_scale.config.run_config import grad_accum_steps as accumulation
from sret_scale.model import preset
from tests.tiny import NUM_IMAGES, tiny_config, tiny_shards


@pytest.mark.parametrize("name", [*RECIPES, "sret_t_1000", "sret_s_108"])
def test_every_recipe_survives_the_way_through_yaml(name: str, tmp_path: Path) -> None:
    config = recipe(name).config
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert from_yaml(file) == config
    # Ranks of a machine without GPUs are its cores.
    assert all(accumulation(config.train, ranks) for ranks in (1, 2))


def test_numbers_are_what_people_write() -> None:
    tree = parse_yaml("a: 1e-3\nb: 1.5E+2\nc: -2e5\nd: 1e6\ne: abc1e3\nf: 0x10", source="text")
    assert tree == {"a": 1e-3, "b": 150.0, "c": -2e5, "d": 1e6, "e": "abc1e3", "f": 16}
    assert override(RunConfig(), ["train.total_images=1e6"]).train.total_images == 1_000_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "'a' is given twice"),
        ("1: 2", "a key must be text"),
        ("a: [1", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_bad_yaml_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_yaml(text, source="text")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.learning_rat=1", "unknown key 'optim.learning_rat': did you mean 'optim.learning_rate'"),
        ("optm.learning_rate=1", "unknown key 'optm.learning_rate': did you mean 'optim.learning_rate'"),
        ("train.learning_rate=1", "did you mean 'optim.learning_rate'"),
        ("lr=3e-4", r"unknown key 'lr': did you mean optim.learning_rate=0.0003\?"),
        ("train.epochs=30", r"did you mean train.total_images=30ep\?"),
        ("data.batch_size=64", r"did you mean train.global_batch_size=64\?"),
        ("train.image_size=64", "did you mean 'model.image_size'"),
        ("num_loops=4", "did you mean 'model.num_loops'"),
        ("train.wd=0.1", r"did you mean optim.weight_decay=0.1\?"),
        ("distill.alpha=0.5", "did you mean distill.hard_weight .*mixup_alpha=0.5"),
        ("train.zzz=1", "valid names: seed, "),
        ("train.total_images=5%", r"expected images \(1281167\) or epochs \(10ep\), got '5%'"),
        ("optim.warmup_images=5 epochs", r"10ep\), or a part of train.total_images \(5%\), got '5 epochs'"),
        ("optim.learning_rate=fast", "optim.learning_rate: .*number, got 'fast'"),
        ("train.seed=1.5", "train.seed: .*integer, got 1.5"),
        ("train.seed=true", "train.seed: .*integer, got True"),
        ("optim.batch_scaling=cubic", "optim.batch_scaling: .*'linear'.*got 'cubic'"),
        ("model=sret_u", "sret_"),
        ("model.stages.3.num_loops=2", "unknown key 'model.stages.3.num_loops'"),
        ("model.stages.0.num_loops=0", "num_loops"),
        ("train.seed.deep=1", "single value"),
        ("train.seed", "not of the form"),
        ("model.image_size=100", "groups"),
        ("memory.schedule=magic", "^memory.schedule: expected"),
        ("train.keep_checkpoints=0", "train.keep_checkpoints: expected above 0, got 0"),
        ("train.log_interval_steps=0", "train.log_interval_steps: expected above 0"),
        ("train.image_std=[1, 0, 1]", "train.image_std: expected above 0"),
        ("train.eval_interval_images=-1", "train.eval_interval_images: expected 0 or more"),
        ("optim.reference_batch_size=0", "optim.reference_batch_size: expected above 0"),
        ("optim.beta2=1", "optim.beta2: expected 0 or more and less than 1"),
    ],
)
def test_bad_overrides_name_the_key_and_what_was_expected(assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(recipe("sret_t").config, [assignment])


def test_overrides_reach_every_level() -> None:
    config = override(
        recipe("sret").config,
        ["model=sret_s", "model.stages.1.num_loops=20", "data.crop_scale=[0.3, 1]", "train.seed=7"],
    )
    assert config.model.stages[1].num_loops == 20
    assert config.model.stages[0] == preset("sret_s").stages[0]
    assert config.data.crop_scale == (0.3, 1.0)
    assert differences(recipe("sret_s").config, config) == [
        "model.stages.1.num_loops: 2 -> 20",
        "data.crop_scale.0: 0.08 -> 0.3",
        "train.seed: 0 -> 7",
    ]


def test_counts_of_images_may_be_epochs_and_parts(tmp_path: Path) -> None:
    shards = tiny_shards(tmp_path)
    counts = ["optim.warmup_images=5%", "depth.loops=growing", "depth.growth_images=2.5ep", "train.total_images=10ep"]
    config = override(tiny_config(shards), [*counts, "train.eval_interval_images=0.01%"])
    assert config.train.total_images == 10 * NUM_IMAGES and config.depth.growth_images == 320
    assert config.optim.warmup_images == 64 and config.train.eval_interval_images == 1
    assert "train.total_images: 1,280 images = 10 epochs of 128" in list(describe_counts(to_plain(config), NUM_IMAGES))
    assert "ep" not in str(to_plain(config)["train"]["total_images"]) and build(RunConfig, to_plain(config)) == config


def test_counts_in_a_file_are_of_the_training_set_that_is_named_last(tmp_path: Path) -> None:
    shards = tiny_shards(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text("model: sret_lt\ntrain: {total_images: 3ep}\noptim: {warmup_images: 50%}\n")
    with pytest.raises(OSError, match="shards/train: no"):
        from_yaml(file)
    config = configuration(str(file), [f"data.train_folder={shards / 'train'}", "optim.warmup_images=25%"])
    assert (config.train.total_images, config.optim.warmup_images) == (3 * NUM_IMAGES, 96)


def test_a_field_of_stages_without_a_number_is_set_in_all() -> None:
    config = override(RunConfig(), ["model.num_loops=4", "model.stages.1.num_loops=6"])
    assert [stage.num_loops for stage in config.model.stages] == [4, 6, 4]
    assert (
        preset("sret_t", num_loops=4, image_size=128)
        == override(RunConfig(), ["model.num_loops=4", "model.image_size=128"]).model
    )


def test_a_file_may_leave_out_defaults_and_name_a_model(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: sret_lt\ntrain: {seed: 3}\n")
    assert from_yaml(file) == replace(RunConfig(), model=preset("sret_lt"), train=replace(RunConfig().train, seed=3))


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'sret_t_108'"):
        recipe("sret_t_109")


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 8))
def test_a_batch_is_never_rounded(micro: int, world: int, steps: int) -> None:
    train = replace(RunConfig().train, micro_batch_size=micro, global_batch_size=micro * world * steps)
    assert accumulation(train, world) == steps
    with pytest.raises(ValueError, match="is not a multiple"):
        accumulation(replace(train, global_batch_size=2 * micro * world * steps + 1), 2 * world)


def test_wrong_sections_are_named() -> None:
    with pytest.raises(ValueError, match="train: expected a section"):
        build(RunConfig, {"train": 3})
    tree = to_plain(RunConfig())
    del tree["model"]["stages"][0]["width"]
    with pytest.raises(ValueError, match=r"model.stages.0.width is not given"):
        build(RunConfig, tree)


@dataclass(frozen=True, kw_only=True)
class _Small:
    """A kind of section.

    size: of it.
    """

    kind: Literal["small"] = "small"
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class _Wide(_Small):
    """Another kind."""

    kind: Literal["wide"] = "wide"  # type: ignore[assignment]
    width: float = 2.0
    """Of it alone."""


@dataclass(frozen=True, kw_only=True)
class _Owner:
    section: _Small | _Wide = field(default_factory=_Small)


def test_kinds_of_a_section_are_told_apart_by_their_name() -> None:
    assert build(_Owner, {"section": {"size": 3}}) == _Owner(section=_Small(size=3))
    assert build(_Owner, {"section": {"kind": "wide", "size": 3}}) == _Owner(section=_Wide(size=3))
    for wrong in ("tall", 3, ["wide"], None):
        with pytest.raises(ValueError, match="kind: expected one of small, wide"):
            build(_Owner, {"section": {"kind": wrong}})
    with pytest.raises(ValueError, match=r"unknown key 'section\.width'"):
        build(_Owner, {"section": {"width": 2.0}})
    meanings = {entry.name: entry.meaning for entry in fields_of(_Owner)}
    assert meanings["section.size"] == "of it." and meanings["section.width"] == "Of it alone."
