"""`sret-scale labels`: everything about stored soft labels. One module an action, found by its name."""

import argparse

from sret_scale.commands.arguments import add_actions, run_action

EXAMPLE = "example: sret-scale labels info labels/vit"

# Name of an action -> what it does. Its arguments and its work are in `sret_scale.commands.labels.NAME`.
ACTIONS = {
    "write": "store a teacher's answers about several views of each image; continues where it was interrupted",
    "verify": "check every byte of a store, and compare samples of it with the teacher",
    "info": "show what a store holds, and how much of the teacher's answers it keeps",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each action."""
    add_actions(parser, __name__, ACTIONS)


run = run_action
