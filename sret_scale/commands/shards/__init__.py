"""`sret-scale shards`: everything about shards on disk. One module an action, found by its name."""

import argparse

from sret_scale.commands.arguments import add_actions, run_action

EXAMPLE = "example: sret-scale shards info shards/fashion/train"

# Name of an action -> what it does. Its arguments and its work are in `sret_scale.commands.shards.NAME`.
ACTIONS = {
    "write": "convert images to webdataset shards with an index and a manifest; continues where it was interrupted",
    "verify": "check every byte and decode every image",
    "info": "show what a shard set holds",
    "head": "draw the first images with their labels",
    "index": "make index and manifest for webdataset tars written by other tools",
    "repair": "copy a set without its bad samples, or with good copies of them",
    "sidecars": "write the small files that wids, timm, open_clip and DALI need to open the shards",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each action."""
    add_actions(parser, __name__, ACTIONS)


run = run_action
