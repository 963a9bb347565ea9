"""`sret-scale labels`: everything about stored soft labels. One module an action, found by its name."""

import argparse

from sret_scale.commands.actions import add_actions, run_action

EXAMPLE = "example: sret-scale labels info labels/vit"

# Name of an action -> what it does. Its arguments and its work are in `sret_scale.commands.labels.NAME`.
ACTIONS = {
    "write": "ask a teacher about V views of each image and store what it says; continues what was interrupted",
    "verify": "read all of a store, and ask the teacher again about some of it",
    "info": "what a store holds, and how much of the teacher it keeps",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each action."""
    add_actions(parser, __name__, ACTIONS)


run = run_action
