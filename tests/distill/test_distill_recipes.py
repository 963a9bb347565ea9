"""The recipes hold what their sources publish, and say what they should reach."""

import pytest

from sret_scale.config.recipes import IMAGENET_IMAGES, RECIPES
from sret_scale.config.run_config import differences
from sret_scale.train.optim import peak_rate, schedule_factor

# For own images of any kind, mazes, text and pairs of it: nobody published them.
OF_OUR_OWN = ("small", "reach", "lm_tiny", "nmt_tiny", "iwslt14_recursive", "wmt14_recursive")
IMAGENET = [name for name in RECIPES if not name.startswith("demo") and name not in OF_OUR_OWN]


@pytest.mark.parametrize("name", IMAGENET)
def test_recipe_names_its_source_and_its_published_result(name: str) -> None:
    about = RECIPES[name].about
    assert "Published" in about and "%" in about
    assert "arXiv" in about or "README" in about or "The same" in about


# Name -> epochs, batch, peak rate, last rate, epochs of warm-up, weight decay: of the sources that each recipe names.
PUBLISHED = {
    "sret": (300, 1024, 2e-3, 2e-5, 30, 0.05),
    "deit": (300, 1024, 1e-3, 1e-5, 5, 0.05),
    "fkd": (300, 1024, 2e-3, 1e-5, 5, 0.05),
    "deit3": (800, 2048, 4e-3, 1e-5, 5, 0.05),
    "finetune_384": (30, 512, 5e-6, 5e-6, 5, 1e-8),
    "finetune_512": (30, 512, 5e-6, 5e-6, 5, 1e-8),
    "deit3_finetune_384": (20, 512, 1e-5, 1e-5, 5, 0.1),
}


@pytest.mark.parametrize("name", IMAGENET)
def test_recipe_has_the_published_numbers(name: str) -> None:
    config = RECIPES[name].config
    optim, train = config.optim, config.train
    epochs, batch, rate, last_rate, warmup_epochs, weight_decay = PUBLISHED[name]
    assert (train.total_images, train.global_batch_size) == (epochs * IMAGENET_IMAGES, batch)
    assert (optim.warmup_images, optim.weight_decay) == (warmup_epochs * IMAGENET_IMAGES, weight_decay)
    peak = peak_rate(optim, batch)
    assert peak == pytest.approx(rate)
    end = schedule_factor(
        train.total_images,
        total_images=train.total_images,
        warmup_images=optim.warmup_images,
        final_ratio=optim.final_rate_ratio,
    )
    assert peak * end == pytest.approx(last_rate)
    assert batch % train.micro_batch_size == 0


def test_deit3_differs_from_sret_in_what_its_paper_changes() -> None:
    changed = {line.split(":")[0] for line in differences(RECIPES["sret"].config, RECIPES["deit3"].config)}
    assert {"distill.hard_loss", "augment.three_augment_rate", "augment.color_jitter", "optim.optimizer"} <= changed
    config = RECIPES["deit3"].config
    assert (config.distill.hard_loss, config.distill.label_smoothing) == ("bce", 0.0)
    assert (config.augment.randaugment_ops, config.augment.erase_rate, config.augment.three_augment_rate) == (0, 0, 1)
    assert (config.augment.mixup_alpha, config.augment.cutmix_alpha, config.data.num_repeats) == (0.8, 1.0, 3)


@pytest.mark.parametrize("name", [name for name in IMAGENET if "finetune" in name])
def test_fine_tuning_starts_from_weights(name: str) -> None:
    config = RECIPES[name].config
    assert config.train.initial_weights is not None
    assert config.model.image_size == int(name[-3:])
