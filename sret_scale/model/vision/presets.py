"""Named models: the published ones, the deep family, and small-image models for the demo.

Bare names are the published defaults; a suffix first says the slicing, then the resolution (`sret_t_no_slice_384`).
"""

import difflib
from dataclasses import replace
from typing import Any

from sret_scale.model.config import ConditioningKind, ProjectionPolicy, SReTConfig, StageConfig

# Paper, table 1: groups of (first loop, later loops) in the three stages.
SLICINGS: dict[str, tuple[tuple[int, ...], ...]] = {
    "": ((8, 2), (4, 1), (1, 1)),
    "_no_slice": ((1,), (1,), (1,)),
    "_16_14_1": ((16, 1), (14, 1), (1, 1)),
}

# Name -> widths, heads, MLP ratio, projection ratio, drop path. Blocks are 2-5-3 in all of them.
SIZES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], float, float, float]] = {
    "sret_t": ((64, 128, 256), (2, 4, 8), 3.6, 1.0, 0.1),
    "sret_lt": ((64, 128, 256), (2, 4, 8), 4.0, 1.0, 0.1),
    "sret_s": ((126, 252, 504), (3, 6, 12), 3.0, 2.0, 0.2),
}

# Name -> size, loops per stage, projection policy, conditioning. The number in the name counts applications.
DEEP: dict[str, tuple[str, tuple[int, int, int], ProjectionPolicy, ConditioningKind]] = {
    "sret_t_108": ("sret_t", (12, 12, 8), "per_application", "none"),
    "sret_t_167": ("sret_t", (17, 17, 16), "per_application", "none"),  # 1000 weight layers, in the published policy
    "sret_t_300": ("sret_t", (30, 33, 25), "per_loop", "none"),
    "sret_t_1000": ("sret_t", (115, 130, 40), "per_loop", "none"),
    "sret_t_1000_shared": ("sret_t", (115, 130, 40), "per_block", "norm_per_loop"),
    "sret_s_108": ("sret_s", (12, 12, 8), "per_loop", "none"),
    "sret_s_300": ("sret_s", (30, 33, 25), "per_block", "norm_per_loop"),
    "sret_s_1000": ("sret_s", (115, 130, 40), "per_block", "norm_per_loop"),
}

# ImageNet-1k top-1 accuracy in percent, (hard labels, distilled), from the table of github.com/szq0214/SReT (last
# epoch; 384 and 512 pixels are distilled models finetuned). No one has published any for the others.
PUBLISHED_ACCURACY: dict[str, tuple[float | None, float | None]] = {
    "sret_t": (76.0, 77.6),
    "sret_t_no_slice": (76.1, 77.7),
    "sret_t_no_slice_384": (None, 79.7),
    "sret_lt_no_slice": (76.8, 77.9),
    "sret_lt_16_14_1": (76.6, 77.7),
    "sret_s": (81.9, None),
    "sret_s_no_slice": (82.0, None),
    "sret_s_no_slice_384": (None, 83.8),
    "sret_s_no_slice_512": (None, 84.3),
}


# One tied block that settles (docs/depth.md): its loops are the most that a step of training runs.
_REACH = StageConfig(
    width=16,
    num_heads=4,
    num_blocks=1,
    num_loops=256,
    mlp_ratio=2.0,
    slices="windows",
    projections="none",
    norm_placement="outer",
    conditioning="input_tied",
)


def _published(size: str, slicing: str, loops: tuple[int, ...] = (2, 2, 2), **stage_options: Any) -> SReTConfig:
    widths, heads, mlp_ratio, projection_ratio, drop_path = SIZES[size]
    stages = tuple(
        StageConfig(
            width=width,
            num_heads=num_heads,
            num_blocks=num_blocks,
            num_loops=num_loops,
            groups=groups,
            mlp_ratio=mlp_ratio,
            projection_ratio=projection_ratio,
            **stage_options,
        )
        for width, num_heads, num_blocks, num_loops, groups in zip(
            widths, heads, (2, 5, 3), loops, SLICINGS[slicing], strict=True
        )
    )
    return SReTConfig(stages=stages, drop_path=drop_path)


def _demo(
    widths: tuple[int, int, int], loops: tuple[int, int, int], groups: tuple[tuple[int, ...], ...], **options: Any
) -> SReTConfig:
    """For 28-pixel images: stem strides 2-2-1 give grids of 7, 4 and 2 tokens a side."""
    stages = tuple(
        StageConfig(
            width=width,
            num_heads=width // 16,
            num_blocks=num_blocks,
            num_loops=num_loops,
            groups=stage_groups,
            mlp_ratio=3.0,
            **options,
        )
        for width, num_blocks, num_loops, stage_groups in zip(widths, (2, 5, 3), loops, groups, strict=True)
    )
    return SReTConfig(stages=stages, image_size=28, num_classes=10, stem_strides=(2, 2, 1))


def _presets() -> dict[str, SReTConfig]:
    table = {}
    for size in SIZES:
        for slicing in SLICINGS:
            config = _published(size, slicing)
            table[size + slicing] = config
            if slicing == "_16_14_1":
                continue  # 14 groups do not divide the 24 x 24 and 32 x 32 tokens of stage 2 at 384 and 512 pixels
            for image_size in (384, 512):
                table[f"{size}{slicing}_{image_size}"] = replace(config, image_size=image_size)
    for name, (size, loops, projections, conditioning) in DEEP.items():
        table[name] = _published(size, "", loops, projections=projections, conditioning=conditioning)
    demo_groups = ((7, 1), (4, 2), (1,))
    table["demo_student_108"] = _demo((32, 64, 128), (12, 12, 8), demo_groups)
    table["demo_control_20"] = _demo((32, 64, 128), (2, 2, 2), demo_groups)
    table["demo_teacher"] = _demo((64, 128, 256), (1, 1, 1), ((1,), (1,), (1,)), projections="none")
    pixels: dict[str, Any] = {"stem": "pixels", "stem_strides": (1, 1, 1), "positions": "none", "head": "tokens"}
    table["reach"] = SReTConfig(stages=(_REACH,), num_classes=2, image_size=15, **pixels)
    return table


PRESETS: dict[str, SReTConfig] = _presets()


def preset(name: str, **overrides: Any) -> SReTConfig:
    """The config of that name, with fields of `SReTConfig`, or of all its stages, replaced.

    ValueError names the closest preset.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(PRESETS)}"
        raise ValueError(f"no preset is called {name!r}; {hint}")
    of_stages = {key: overrides.pop(key) for key in list(overrides) if key in StageConfig.__dataclass_fields__}
    stages = tuple(replace(stage, **of_stages) for stage in PRESETS[name].stages)
    return replace(PRESETS[name], **{"stages": stages, **overrides})
