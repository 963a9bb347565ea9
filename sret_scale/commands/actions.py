"""Commands that consist of actions (`shards write`, `labels info`): one module an action, found by its name."""

import argparse
import importlib
from collections.abc import Mapping


def add_actions(parser: argparse.ArgumentParser, package: str, actions: Mapping[str, str]) -> None:
    """One sub-command for each action: name -> what it does. Its arguments and its work are in `package.NAME`."""
    sub_parsers = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, text in actions.items():
        module = importlib.import_module(f"{package}.{name}")
        action = sub_parsers.add_parser(
            name,
            help=text,
            description=text,
            epilog=module.EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(action)
        action.set_defaults(run_action=module.run)


def run_action(args: argparse.Namespace) -> int | None:
    """Run the action that was asked for."""
    status: int | None = args.run_action(args)
    return status
