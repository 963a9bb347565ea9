"""`sret-scale labels`: everything about stored soft labels. One module an action, found by its name."""

import argparse
import importlib

EXAMPLE = "example: sret-scale labels info labels/vit"

# Name of an action -> what it does. Its arguments and its work are in `sret_scale.commands.labels.NAME`.
ACTIONS = {
    "write": "ask a teacher about V views of each image and store what it says; continues what was interrupted",
    "verify": "read all of a store, and ask the teacher again about some of it",
    "info": "what a store holds, and how much of the teacher it keeps",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each action."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, text in ACTIONS.items():
        module = importlib.import_module(f"sret_scale.commands.labels.{name}")
        action = actions.add_parser(
            name,
            help=text,
            description=text,
            epilog=module.EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(action)
        action.set_defaults(run_action=module.run)


def run(args: argparse.Namespace) -> int | None:
    """Run the action that was asked for."""
    status: int | None = args.run_action(args)
    return status
