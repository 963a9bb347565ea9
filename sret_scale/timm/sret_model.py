"""SReT with the interface that timm's scripts and feature extractors expect of a model.

Letters: B batch, D width, C classes.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sret_scale.memory import MemoryConfig, apply_recomputation
from sret_scale.model import PRESETS, Noise, SReT, preset
from sret_scale.model.depth_plan import DepthPlan
from sret_scale.model.vision.carry_weights import resized_position
from sret_scale.model.vision.official import from_published, published_names
from sret_scale.timm.door import import_timm


class TimmSReT(SReT):
    """An SReT whose training randomness comes from torch's global generator, as timm's training loop has no seeds."""

    def __init__(
        self,
        preset_name: str,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] | None = None,
        drop_path_rate: float | None = None,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        num_loops: int | None = None,
    ) -> None:
        """num_classes 0 leaves the head out; drop_path_rate, and num_loops of all stages, None is the preset's.

        ValueError for what SReT has not.
        """
        overrides: dict[str, Any] = {"num_classes": max(num_classes, 1), "in_channels": in_chans, "dropout": drop_rate}
        if img_size is not None:
            overrides["image_size"] = _square(img_size)
        if num_loops is not None:
            overrides["num_loops"] = num_loops
        if drop_path_rate is not None:
            overrides["drop_path"] = drop_path_rate
        super().__init__(preset(preset_name, **overrides))
        config = self.config
        self.num_features = self.head_hidden_size = config.stages[-1].width
        strides = [config.image_size // grid for grid in config.grids]
        self.feature_info = [
            {"num_chs": stage.width, "reduction": stride, "module": f"stages.{index}"}
            for index, (stage, stride) in enumerate(zip(config.stages, strides, strict=True))
        ]
        self.grad_checkpointing = False
        self.num_classes, self.global_pool = num_classes, "avg"
        self.reset_classifier(num_classes, global_pool)

    def forward(
        self, images_BCHW: Tensor, noise: Noise | None = None, plans: Sequence[DepthPlan] | None = None
    ) -> Tensor:
        """As of SReT; in training a noise is drawn where none is given."""
        if noise is None and self.training:
            seeds = torch.randint(2**62, (2,)).tolist()
            noise = Noise(permutation_seed=seeds[0], sample_seed=seeds[1])
        return super().forward(images_BCHW, noise, plans)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """(last stage's tokens, [tokens of the chosen stages]), or the list alone; norm applies to the last stage."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt}")
        take = import_timm().models._features.feature_take_indices
        wanted, last = take(len(self.stages), indices)
        intermediates = []
        for index, x_BDHW in enumerate(self.stage_outputs(x)):
            if norm and index == len(self.stages) - 1:
                x_BDHW = self.norm(x_BDHW.movedim(1, -1)).movedim(-1, 1)
            if index in wanted:
                intermediates.append(x_BDHW)
            if stop_early and index == last:
                break
        return intermediates if intermediates_only else (x_BDHW, intermediates)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return cast(nn.Module, self.head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for this many classes, or none for 0; then global_pool "" gives tokens (B, D, H, W) for scores.

        None leaves the pooling as it is. ValueError for another pooling, or for classes without one.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("", "avg") or (num_classes and not pool):
            raise ValueError(f"SReT pools by average, got global_pool {pool!r} for {num_classes} classes")
        self.global_pool = pool
        if num_classes != self.num_classes or num_classes == 0:
            device, dtype = self.norm.weight.device, self.norm.weight.dtype
            head = nn.Linear(self.num_features, num_classes, device=device, dtype=dtype) if num_classes else None
            self.head = head or nn.Identity()  # type: ignore[assignment]
            self.num_classes = num_classes

    def forward_head(self, x_BDHW: Tensor, pre_logits: bool = False) -> Tensor:
        """As of SReT; without pooling the tokens with their norm, (B, D, H, W)."""
        if self.global_pool:
            return super().forward_head(x_BDHW, pre_logits)
        return self.norm(x_BDHW.movedim(1, -1)).movedim(-1, 1)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that do not decay."""
        return {name for name, tag in self.parameter_tags().items() if not tag.decay}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names for layer-wise rates: by stage, or by block."""
        if coarse:
            return {"stem": r"^stem|^position", "blocks": r"^stages\.(\d+)|^pools\.(\d+)"}
        blocks = [
            (r"^stages\.(\d+)\.(?:blocks|projections)\.(\d+)", None),
            (r"^pools\.(\d+)", (99,)),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem|^position", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Store one boundary per application and compute the rest again in the backward pass, or not."""
        self.grad_checkpointing = enable
        apply_recomputation(self, MemoryConfig(schedule="per_application" if enable else "none"))


def register_presets() -> None:
    """Put every preset that classifies images into timm's registry; a name that is there already is left."""
    timm = import_timm()
    for name, config in PRESETS.items():
        if config.head == "classes" and not timm.is_model(name):
            timm.models.register_model(_entrypoint(name))


def checkpoint_filter(state: dict[str, Any], model: SReT) -> dict[str, Tensor]:
    """A state dict for the model of a published checkpoint's, whole or under "model", or of our own.

    Its position tensor is brought to the model's image size.
    """
    state = state.get("model", state)
    if "pos_embed" in state:
        known = set(published_names(model.config))
        state = from_published(model.config, {key: value for key, value in state.items() if key in known})
    if "position" in state:
        state = {**state, "position": resized_position(state["position"], model.config.grids[0])}
    return state


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        build = import_timm().models.build_model_with_cfg
        return build(
            TimmSReT,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter,
            feature_cfg={"out_indices": (0, 1, 2), "feature_cls": "getter"},
            preset_name=name,
            **{**kwargs, "pretrained_cfg": kwargs.get("pretrained_cfg") or _default_cfg(name)},
        )

    create.__name__ = name
    create.__doc__ = f"The preset {name} of sret_scale."
    return create


def _default_cfg(name: str) -> dict[str, Any]:
    constants = import_timm().data
    config = PRESETS[name]
    size = config.image_size
    return {
        "url": "",
        "architecture": name,
        "num_classes": config.num_classes,
        "input_size": (config.in_channels, size, size),
        "fixed_input_size": True,
        "pool_size": (config.grids[-1], config.grids[-1]),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": constants.IMAGENET_DEFAULT_MEAN,
        "std": constants.IMAGENET_DEFAULT_STD,
        "first_conv": "stem.convs.0",
        "classifier": "head",
        "license": "apache-2.0",
    }


def _square(img_size: int | Sequence[int]) -> int:
    sides = {img_size} if isinstance(img_size, int) else set(img_size)
    if len(sides) != 1:
        raise ValueError(f"SReT takes square images, got img_size {img_size}")
    return int(sides.pop())
