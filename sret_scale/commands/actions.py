"""Commands that consist of actions (`shards write`, `labels info`): one module an action, found by its name."""

import argparse
import importlib
from collections.abc import Mapping, Sequence
from typing import Any


class _Intermixed(argparse.ArgumentParser):
    """Takes options also between a command's folders. Before Python 3.12.7 one that may be left out has to stand
    together with those before it otherwise."""

    _is_parsing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._is_parsing:
            return super().parse_known_args(args, namespace)
        self._is_parsing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_parsing = False


def add_actions(parser: argparse.ArgumentParser, package: str, actions: Mapping[str, str]) -> None:
    """One sub-command for each action: name -> what it does. Its arguments and its work are in `package.NAME`."""
    sub_parsers = parser.add_subparsers(title="actions", metavar="ACTION", required=True, parser_class=_Intermixed)
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


def parsed(command: str, words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command of `sret_scale.commands`; where they are wrong the process ends with its usage."""
    parser = argparse.ArgumentParser(prog=f"sret-scale {command}")
    parser.add_argument("--debug", action="store_true")
    importlib.import_module(f"sret_scale.commands.{command}").add_arguments(parser)
    try:
        return parser.parse_intermixed_args(words)
    except TypeError:
        # Commands with actions of their own, as in `sret_scale.cli`.
        return parser.parse_args(words)
