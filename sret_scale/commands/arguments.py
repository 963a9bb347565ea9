"""The parsers of commands, which are found by their names, as are the actions of some (`shards write`); and the options
that several have."""

import argparse
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sret_scale.commands import COMMANDS

WEIGHTS: dict[str, Any] = {
    "choices": ("raw", "ema", "best"),
    "help": "of a run: which weights (default: the moving average, if kept)",
}
CACHE: dict[str, Any] = {
    "choices": ("each", "last", "first"),
    "default": "each",
    "help": "keys and values of earlier tokens: those of each loop of a block (default, exact), or in every loop those "
    "of its last or first one (not exact; the memory of one loop)",
}
HOSTFILE: dict[str, Any] = {
    "type": Path,
    "help": "nodes to run on, in DeepSpeed's format: one line `NAME slots=N` each",
}
WORKERS: dict[str, Any] = {
    "type": int,
    "default": os.cpu_count() or 1,
    "help": "number of processes (default: one per core)",
}


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


def build_parser(command: str) -> argparse.ArgumentParser:
    """The parser of one sub-command."""
    module = importlib.import_module(f"sret_scale.commands.{command}")
    parser = argparse.ArgumentParser(
        prog=f"sret-scale {command}",
        description=COMMANDS[command],
        epilog=module.EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    module.add_arguments(parser)
    parser.set_defaults(run_command=module.run)
    return parser


def parsed(command: str, words: Sequence[str]) -> argparse.Namespace:
    """The arguments of one sub-command; where they are wrong the process ends with its usage."""
    parser = build_parser(command)
    try:
        # Options may stand between positional arguments: `train NAME --run FOLDER section.field=value`.
        return parser.parse_intermixed_args(words)
    except TypeError:
        # argparse has no such order for a command that has sub-commands of its own.
        return parser.parse_args(words)
