"""`sret-scale shards info`: what a shard set holds, from its manifest and index."""

import argparse
import json
from pathlib import Path
from typing import Any

EXAMPLE = "example: sret-scale shards info shards/fashion/train --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder and how to print it."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the shard set")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(args: argparse.Namespace) -> None:
    """Print counts, sizes and the class balance."""
    from data_pipelines.checked_files import printable
    from data_pipelines.upkeep.stats import summarize_shards

    facts = summarize_shards(args.folder)
    print(json.dumps(facts, indent=2) if args.json else printable(lines(facts)))


def lines(facts: dict[str, Any]) -> str:
    """The facts as aligned lines, with a bar for each class (the first 20)."""
    text = [f"{facts['folder']}"]
    if place := facts["writer"].get("location"):
        text.append(f"  {'tars at':<12} {place}")
    for name in (name for name in facts if name not in ("folder", "class_counts", "writer")):
        value = facts[name]
        shown = f"{value:,}" if isinstance(value, int) else _spread(value) if isinstance(value, dict) else value
        text.append(f"  {name.replace('_', ' '):<12} {shown}")
    counts: dict[str, int] = facts["class_counts"]
    most = max(counts.values(), default=0)
    for class_name, count in list(counts.items())[:20]:
        text.append(f"  {class_name[:24]:<24} {count:>9,} {'#' * round(30 * count / most)}")
    if len(counts) > 20:
        text.append(f"  and {len(counts) - 20:,} more classes with {min(counts.values()):,} to {most:,} samples each")
    return "\n".join(text)


def _spread(value: dict[str, int]) -> str:
    return f"{value['smallest']:,} to {value['largest']:,}, median {value['median']:,}"
