"""`sret-scale describe`: what a model is made of and what it costs."""

import argparse
import json
from typing import Any

EXAMPLE = """examples:
  sret-scale describe sret_t_1000 --image-size 384 --json
  sret-scale describe sret_t model.num_loops=8
  sret-scale describe runs/demo/student"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The preset and how to print it."""
    parser.add_argument("preset", nargs="?", help="a preset such as sret_t, recipe, YAML file or run (default: all)")
    parser.add_argument("overrides", nargs="*", metavar="model.field=value", help="fields of the model to change")
    parser.add_argument("--image-size", type=int, help="side of the square input in pixels (default: the preset's)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> None:
    """Print the counts of one preset, or a line for each."""
    from sret_scale.config.recipes import configuration, of_run_too
    from sret_scale.model import PRESETS, describe

    if args.preset is None:
        every = {name: describe(config, args.image_size) for name, config in PRESETS.items()}
        print(json.dumps(every, indent=2) if args.json else overview(every))
        return
    model = configuration(of_run_too(args.preset), args.overrides).model
    # What was published of a preset says nothing of a changed one.
    counts = {"preset": " ".join([args.preset, *args.overrides])} | describe(model, args.image_size)
    print(json.dumps(counts, indent=2) if args.json else table(counts))


def overview(every: dict[str, dict[str, Any]]) -> str:
    """One line a preset."""
    from sret_scale.model import PRESETS

    lines = [f"{'preset':<22}{'image':>6}{'applications':>14}{'parameters':>13}{'MACs':>18}  published top-1"]
    lines.extend(
        f"{name:<22}{counts['image_size']:>6}{counts['applications']:>14,}{counts['parameters']:>13,}{counts['macs']:>18,}"
        f"  {accuracy(name) if counts['image_size'] == PRESETS[name].image_size else '-'}"
        for name, counts in every.items()
    )
    return "\n".join(lines)


def table(counts: dict[str, Any]) -> str:
    """The counts as aligned lines of text."""
    published = accuracy(counts["preset"])
    of_paper = f"  published top-1     {published:>15}   percent on ImageNet-1k at the preset's size"
    lines = [
        f"{counts['preset']} {_size(counts)}",
        f"  parameters          {counts['parameters']:>15,}",
        *([of_paper] if published != "-" else []),
        f"  MACs                {counts['macs']:>15,}",
        f"  MACs as published   {counts['macs_published']:>15,}   without the head",
        f"  applications        {counts['applications']:>15,}",
        f"  residual sub-layers {counts['residual_sublayers']:>15,}",
        f"  weight layers       {counts['weight_layers']:>15,}",
        "",
    ]
    columns = {
        "tokens" if "context" in counts else "grid": "tokens" if "context" in counts else "grid",
        "width": "width",
        "heads": "heads",
        "blocks": "blocks",
        "loops": "loops",
        "groups": "groups",
        "projections": "projections",
        "branch_scheme": "scheme",
        "skip": "skip",
        "conditioning": "conditioning",
        "parameters": "parameters",
        "macs": "MACs",
    }
    rows = [["stage", *columns.values()]]
    for index, stage in enumerate(counts["stages"]):
        rows.append([str(index), *(_cell(stage[key]) for key in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        lines.append("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    return "\n".join(lines)


def _size(counts: dict[str, Any]) -> str:
    if "context" in counts:
        return f"with a context of {counts['context']:,} {counts['unit']}; MACs are of a whole context"
    return f"at {counts['image_size']} x {counts['image_size']}, {counts['num_classes']} classes"


def accuracy(name: str) -> str:
    """Published accuracy of a preset, hard labels and distilled, or "-"."""
    from sret_scale.model.vision.presets import PUBLISHED_ACCURACY

    hard, distilled = PUBLISHED_ACCURACY.get(name, (None, None))
    found = [] if hard is None else [f"{hard}"]
    found += [] if distilled is None else [f"{distilled} distilled"]
    return ", ".join(found) or "-"


def _cell(value: object) -> str:
    if isinstance(value, list):
        return "-".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
