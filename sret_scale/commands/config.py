"""`sret-scale config`: prints every setting of a run, as docs/configuration.md has it."""

import argparse

EXAMPLE = """examples:
  sret-scale config optim
  sret-scale config > docs/configuration.md"""

HEADER = """# Every setting of a run

Printed by `sret-scale config`, from the dataclasses that it names: type, default, meaning. Set one with
`section.field=value`; `sret-scale train RECIPE --dry-run` shows the values of a recipe, whose model is a preset.

"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which part."""
    parser.add_argument("section", nargs="?", help="model, data, augment, ... (default: all)")


def run(args: argparse.Namespace) -> None:
    """Print it."""
    from sret_scale.config.fields import page
    from sret_scale.config.run_config import RunConfig

    print(("" if args.section else HEADER) + page(RunConfig, args.section), end="")
