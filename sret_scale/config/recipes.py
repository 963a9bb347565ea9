"""Recipes: complete run configurations by name. Each says where its values come from and what it should reach."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipelines.image.augment import AugmentConfig
from data_pipelines.stream.loader import DataConfig
from sret_scale.config.run_config import (
    EngineConfig,
    GridConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    from_yaml,
    model_of,
    nearest,
    override,
)
from sret_scale.config.step_depth import DepthConfig
from sret_scale.config.telemetry_config import TelemetryConfig
from sret_scale.distill import DistillConfig
from sret_scale.memory import MemoryConfig
from sret_scale.model import PRESETS, StageConfig, TextConfig, TranslationConfig, preset

IMAGENET_IMAGES = 1_281_167
# Crop and flip alone; those belong to the data.
NO_AUGMENTATION = AugmentConfig(randaugment_ops=0, erase_rate=0.0, mixup_alpha=0.0, cutmix_alpha=0.0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run configuration and, in a sentence, its source and expected result."""

    config: RunConfig
    about: str
    texts: tuple[str, ...] = ()
    """`section.field=value` that the training set decides."""


def recipe(name: str) -> Recipe:
    """The recipe of that name, or `sret` with the preset, or `timm:NAME`, of that name; ValueError with the nearest."""
    if name in RECIPES:
        return RECIPES[name]
    if name in PRESETS or name.startswith("timm:"):
        base = RECIPES["sret"]
        return replace(base, config=replace(base.config, model=model_of(name)))
    raise ValueError(f"no recipe or model preset {name!r}: {nearest(name, [*RECIPES, *PRESETS])}")


def configuration(name: str, assignments: Sequence[str] = ()) -> RunConfig:
    """Of a recipe, a model preset, or a YAML file, which its ending tells; then `section.field=value` as in `override`.

    ValueError or OSError for none of these.
    """
    file = Path(name)
    if is_file_name(name):
        return from_yaml(file, assignments)
    if file.is_dir():
        raise ValueError(f"{name} is a folder: expected its configuration, {file / 'config.yaml'}")
    chosen = recipe(name)
    return override(chosen.config, [*chosen.texts, *assignments])


def of_run_too(name: str) -> str:
    """`name`, or the configuration of a run, where it is the run's folder."""
    file = Path(name) / "config.yaml"
    return str(file) if file.is_file() else name


def is_file_name(name: str) -> bool:
    """True for what is read as a file and not looked up among the recipes."""
    return name.endswith((".yaml", ".yml"))


def _sret() -> RunConfig:
    return RunConfig(
        model=preset("sret_t"),
        data=DataConfig(train_folder="shards/imagenet/train", test_folder="shards/imagenet/validation"),
        augment=AugmentConfig(),
        memory=MemoryConfig(schedule="none"),
        distill=DistillConfig(label_smoothing=0.1),
        optim=OptimConfig(
            learning_rate=1e-3,
            reference_batch_size=512,
            batch_scaling="linear",
            final_rate_ratio=0.01,
            warmup_images=30 * IMAGENET_IMAGES,
            weight_decay=0.05,
        ),
        train=TrainConfig(
            total_images=300 * IMAGENET_IMAGES,
            global_batch_size=1024,
            micro_batch_size=128,
            eval_interval_images=10 * IMAGENET_IMAGES,
            checkpoint_interval_images=IMAGENET_IMAGES,
            log_interval_steps=50,
        ),
        engine=EngineConfig(ds_config="zero0_autocast"),
    )


def _deit() -> RunConfig:
    base = _sret()
    return replace(
        base,
        data=replace(base.data, num_repeats=3),
        optim=replace(base.optim, learning_rate=5e-4, warmup_images=5 * IMAGENET_IMAGES),
    )


def _fkd() -> RunConfig:
    base = _sret()
    return replace(
        base,
        model=preset("sret_lt"),
        data=replace(base.data, num_repeats=4, interpolation="bilinear"),
        augment=NO_AUGMENTATION,
        distill=DistillConfig(teacher_input="view"),
        optim=replace(
            base.optim,
            learning_rate=2e-3,
            batch_scaling="none",
            final_rate_ratio=0.005,
            warmup_images=5 * IMAGENET_IMAGES,
        ),
    )


def _deit3() -> RunConfig:
    base = _sret()
    return replace(
        base,
        model=preset("sret_s", drop_path=0.05),
        data=replace(base.data, num_repeats=3, eval_crop_rate=1.0),
        augment=AugmentConfig(randaugment_ops=0, three_augment_rate=1.0, color_jitter=0.3, erase_rate=0.0),
        distill=DistillConfig(hard_loss="bce"),
        optim=replace(
            base.optim,
            optimizer="lamb",
            learning_rate=4e-3,
            batch_scaling="none",
            final_rate_ratio=0.0025,
            warmup_images=5 * IMAGENET_IMAGES,
        ),
        train=replace(base.train, total_images=800 * IMAGENET_IMAGES, global_batch_size=2048),
    )


def _fine_tuning(model: str, weights: str, *, rate: float, weight_decay: float, epochs: int) -> RunConfig:
    """At a constant rate after the warm-up, which is what lower bounds equal to the rate make of their cosines."""
    base = _sret()
    return replace(
        base,
        model=preset(model),
        data=replace(base.data, eval_crop_rate=1.0),
        optim=replace(
            base.optim,
            learning_rate=rate,
            batch_scaling="none",
            final_rate_ratio=1.0,
            warmup_images=5 * IMAGENET_IMAGES,
            weight_decay=weight_decay,
        ),
        train=replace(
            base.train,
            initial_weights=weights,
            total_images=epochs * IMAGENET_IMAGES,
            global_batch_size=512,
            micro_batch_size=32,
            eval_interval_images=IMAGENET_IMAGES,
        ),
    )


def _deit_fine_tuning(model: str) -> RunConfig:
    config = _fine_tuning(model, "run:runs/sret_s_no_slice", rate=5e-6, weight_decay=1e-8, epochs=30)
    return replace(config, data=replace(config.data, num_repeats=3))


def _deit3_fine_tuning() -> RunConfig:
    config = _fine_tuning("sret_s_384", "run:runs/deit3", rate=1e-5, weight_decay=0.1, epochs=20)
    return replace(config, model=preset("sret_s_384", drop_path=0.0), augment=AugmentConfig(erase_rate=0.0))


def _demo(model: str, *, total_images: int, learning_rate: float) -> RunConfig:
    return RunConfig(
        model=preset(model),
        data=DataConfig(crop="padded", crop_padding=1, eval_crop_rate=1.0, workers=1),
        augment=NO_AUGMENTATION,
        memory=MemoryConfig(schedule="none"),
        optim=OptimConfig(
            learning_rate=learning_rate,
            batch_scaling="none",
            warmup_images=total_images // 20,
            weight_decay=0.1,
            ema_horizon_images=1_500,
        ),
        train=TrainConfig(
            total_images=total_images,
            global_batch_size=64,
            micro_batch_size=32,
            eval_interval_images=total_images // 2,
            checkpoint_interval_images=total_images // 2,
            log_interval_steps=10,
            image_mean=(0.286, 0.286, 0.286),
            image_std=(0.353, 0.353, 0.353),
        ),
        engine=EngineConfig(ds_config="zero0"),
    )


def _small() -> RunConfig:
    return RunConfig(
        # As many slices as divide the tokens, at any size.
        model=preset("sret_t", group_fit="nearest", image_size=128),
        memory=MemoryConfig(schedule="none"),
        distill=DistillConfig(label_smoothing=0.1),
        optim=OptimConfig(learning_rate=5e-4, batch_scaling="none", weight_decay=0.05),
        train=TrainConfig(global_batch_size=64, micro_batch_size=8),
    )


def _reach() -> RunConfig:
    """As `experiments/reach.py` trains, whose log says why: the loss waits for the front, and loops begin anywhere."""
    return RunConfig(
        task="grid",
        model=preset("reach"),
        data=DataConfig(
            train_folder="shards/mazes/train", test_folder="shards/mazes/test", crop="none", flip_rate=0.0, workers=1
        ),
        augment=NO_AUGMENTATION,
        memory=MemoryConfig(schedule="none"),
        # What stands before the ten loops with gradient is up to three times the longest way at 15 pixels.
        depth=DepthConfig(loops="log_uniform", min_loops=10, max_loops=214, backprop_loops=10, supervise_every=2),
        grid=GridConfig(ask_within=0.5, bins="before"),
        optim=OptimConfig(
            learning_rate=4e-3,
            batch_scaling="none",
            final_rate_ratio=0.0,
            warmup_images=1_600,
            weight_decay=0.0,
            beta2=0.98,
            ema_horizon_images=3_200,
        ),
        train=TrainConfig(
            total_images=40_000,
            global_batch_size=16,
            micro_batch_size=8,
            compile="blocks",
            checkpoint_interval_images=8_000,
            log_interval_steps=50,
            image_mean=(0.0, 0.0, 0.0),
            image_std=(1.0, 1.0, 1.0),
        ),
        telemetry=TelemetryConfig(interval_steps=0),
    )


def _language() -> RunConfig:
    """Choices of this project, not tuned, for an hour on a core."""
    stage = StageConfig(width=128, num_heads=4, num_blocks=2, num_loops=4)
    return RunConfig(
        task="language",
        model=TextConfig(stages=(stage,)),
        data=DataConfig(train_folder="shards/text/train", test_folder="shards/text/test", workers=1),
        augment=NO_AUGMENTATION,
        memory=MemoryConfig(schedule="none"),
        optim=OptimConfig(learning_rate=2e-3, batch_scaling="none", warmup_images=640, weight_decay=0.1, beta2=0.98),
        train=TrainConfig(
            total_images=16_000,
            global_batch_size=8,
            micro_batch_size=4,
            checkpoint_interval_images=1_600,
            log_interval_steps=20,
        ),
    )


def _translation() -> RunConfig:
    """Choices of this project, hardly tuned, for less than an hour on two cores."""
    stage = StageConfig(width=128, num_heads=4, num_blocks=2, num_loops=3)
    return RunConfig(
        task="translation",
        model=TranslationConfig(stages=(stage, stage), vocabulary=4000, context=256),
        data=DataConfig(train_folder="shards/pairs/train", test_folder="shards/pairs/dev", workers=1),
        augment=NO_AUGMENTATION,
        memory=MemoryConfig(schedule="none"),
        optim=OptimConfig(learning_rate=3e-3, batch_scaling="none", warmup_images=8_000, weight_decay=0.05, beta2=0.98),
        train=TrainConfig(
            total_images=200_000,
            global_batch_size=32,
            micro_batch_size=16,
            compile="none",
            eval_interval_images=20_000,
            checkpoint_interval_images=20_000,
            log_interval_steps=20,
        ),
    )


def _fairseq(name: str, stage: StageConfig, vocabulary: int, dropout: float, *, batch: int, steps: int) -> RunConfig:
    """fairseq's settings for a set, but for a cosine in place of its inverse square root, and batches of so many pairs
    in place of tokens."""
    folder, base = f"shards/{name}", _translation()
    return replace(
        base,
        model=TranslationConfig(stages=(stage, stage), vocabulary=vocabulary, context=512, dropout=dropout),
        data=replace(base.data, train_folder=f"{folder}/train", test_folder=f"{folder}/valid"),
        distill=DistillConfig(label_smoothing=0.1),
        optim=replace(base.optim, learning_rate=5e-4, warmup_images=4_000 * batch, weight_decay=1e-4),
        train=replace(
            base.train,
            total_images=steps * batch,
            global_batch_size=batch,
            micro_batch_size=batch // 8,
            checkpoint_interval_images=1_000 * batch,
            eval_interval_images=1_000 * batch,
        ),
    )


def _twice(num_blocks: int, num_heads: int, mlp_ratio: float) -> StageConfig:
    return StageConfig(width=512, num_heads=num_heads, num_blocks=num_blocks, num_loops=2, mlp_ratio=mlp_ratio)


RECIPES = {
    "small": Recipe(
        config=_small(),
        about="Hundreds to tens of thousands of own images at 64 to 224 pixels (model.image_size, 128 by default): 100 "
        "epochs, batch 64, on 1, 2, 4 or 8 ranks. Choices of this project, not tuned and without a published accuracy.",
        texts=(
            "model.num_classes=auto",
            "train.total_images=100ep",
            "optim.warmup_images=5%",
            "train.eval_interval_images=5%",
            "train.checkpoint_interval_images=5%",
        ),
    ),
    "sret": Recipe(
        config=_sret(),
        about="The published one (arXiv 2111.05297, section 5): 300 epochs of ImageNet, AdamW, batch 1024, rate 1e-3 x "
        "batch / 512; here gradients are clipped at norm 1. Published: SReT-T 76.0 %, S 81.9 % top-1.",
    ),
    "deit": Recipe(
        config=_deit(),
        about="DeiT (arXiv 2012.12877, table 9; repeated augmentation as in its code), for a comparison at equal "
        "training. Published for DeiT's own models: Ti 72.2 %, S 79.9 %; none for SReT.",
    ),
    "fkd": Recipe(
        config=_fkd(),
        about="Fast knowledge distillation (arXiv 2112.01528) from stored labels: crop and flip only, 4 crops an "
        "image. Give the store with distill.teacher=labels:FOLDER, and data.num_views and data.view_seed as it was "
        "written. "
        "Published: SReT-LT 78.7 %.",
    ),
    "deit3": Recipe(
        config=_deit3(),
        about="DeiT III (arXiv 2204.07118; the command of its README_revenge.md for ViT-S): LAMB at 4e-3, batch 2048, "
        "BCE, 3-Augment, 800 epochs of ImageNet; SReT's residual coefficients are in the place of LayerScale. "
        "Published for its own ViT-S: 81.4 % top-1; none for SReT.",
    ),
    "finetune_384": Recipe(
        config=_deit_fine_tuning("sret_s_no_slice_384"),
        about="A trained model at 384 pixels, from train.initial_weights. SReT publishes results but no settings: "
        "these are DeiT's (README_deit.md: 30 epochs, AdamW at 5e-6, weight decay 1e-8, batch 512). Published, "
        "distilled and without slices: SReT-T 79.7 %, SReT-S 83.8 % top-1.",
    ),
    "finetune_512": Recipe(
        config=_deit_fine_tuning("sret_s_no_slice_512"),
        about="The same at 512 pixels. Published, distilled and without slices: SReT-S 84.3 % top-1; none for SReT-T.",
    ),
    "deit3_finetune_384": Recipe(
        config=_deit3_fine_tuning(),
        about="A model of `deit3` at 384 pixels (README_revenge.md for ViT-S: 20 epochs, AdamW at 1e-5, weight decay "
        "0.1, batch 512, RandAugment, cross-entropy). Published for DeiT III's ViT-S: 83.4 % top-1; none for SReT.",
    ),
    "reach": Recipe(
        config=_reach(),
        about="One block of 2,504 parameters learns on mazes of at most 15 pixels what a source reaches, and is then "
        "applied as often as larger ones need (`shards write mazes TARGET --size 7-15 --count 10000 --puzzle reach`). "
        "A sketch with these settings read ways of 296 pixels after 300 to 500 applications in three seeds of three.",
    ),
    "lm_tiny": Recipe(
        config=_language(),
        about="A language model over bytes of 0.73 million parameters, 2 blocks applied 4 times each, on windows of "
        "`shards write text` (256 bytes). What it reaches on plays that it has not seen is in docs/language.md.",
    ),
    "nmt_tiny": Recipe(
        config=_translation(),
        about="A translator of 1.9 million parameters, 2 blocks applied 3 times each on either side, on pairs of "
        "`shards write tsv` or `moses --vocabulary 4000`. What it reaches is in docs/language.md.",
        texts=("data.tokens=auto",),
    ),
    "iwslt14_recursive": Recipe(
        config=_fairseq("iwslt14", _twice(3, 4, 2.0), 10_000, 0.3, batch=128, steps=60_000),
        about="IWSLT14 German to English, 3 blocks applied twice on either side in place of 6 layers. Not run: the "
        "files are not ours to ship. The protocol is fairseq's (transformer_iwslt_de_en), not SReT's, with a cosine "
        "for its inverse square root and 128 pairs for its batch of 4,096 tokens. Commands are in docs/language.md.",
        texts=("data.tokens=auto",),
    ),
    "wmt14_recursive": Recipe(
        config=_fairseq("wmt14", _twice(6, 8, 4.0), 32_000, 0.1, batch=1024, steps=100_000),
        about="WMT14, 6 blocks applied twice on either side: SEQUENCE 6/12 of arXiv 2104.06022 (model.loop_order has "
        "its CYCLE and CYCLE (REV)). Not run: the files are not ours to ship. Fairseq's protocol, with a cosine for "
        "its inverse square root and 1,024 pairs for 8 times 3,584 tokens. Commands are in docs/language.md.",
        texts=("data.tokens=auto",),
    ),
    "demo_teacher": Recipe(
        config=_demo("demo_teacher", total_images=40_000, learning_rate=2e-3),
        about="A wider model without recursion on the sample images: a minute and a half on two CPU cores.",
    ),
    "demo_student_108": Recipe(
        config=replace(
            _demo("demo_student_108", total_images=24_000, learning_rate=2e-3),
            # Nearly all that it takes without recomputation: the planner recomputes what does not fit.
            memory=MemoryConfig(schedule="planned", budget_bytes=384 * 2**20),
        ),
        about="108 applications of 10 blocks, distilled from the demo's teacher, within 384 MiB a rank.",
    ),
    "demo_control_20": Recipe(
        config=_demo("demo_control_20", total_images=24_000, learning_rate=2e-3),
        about="The same 10 blocks at the published 2 loops, same teacher and number of images.",
    ),
}
