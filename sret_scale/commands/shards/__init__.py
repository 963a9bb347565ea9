"""`sret-scale shards`: everything about shards on disk. One module an action, found by its name."""

import argparse

from sret_scale.commands.actions import add_actions, run_action

EXAMPLE = "example: sret-scale shards info shards/fashion/train"

# Name of an action -> what it does. Its arguments and its work are in `sret_scale.commands.shards.NAME`.
ACTIONS = {
    "write": "images to webdataset shards with index and manifest; continues what was interrupted",
    "verify": "read everything, check every byte, decode every image",
    "info": "what a shard set holds",
    "head": "draw the first images with their labels",
    "index": "index and manifest for webdataset tars that someone else wrote",
    "repair": "a new set without the bad samples of another, or with good copies of them",
    "bench": "measure how fast a set is read here, and what the loader reaches",
    "sidecars": "the small files by which wids, timm, open_clip and DALI open the shards",
    "trace": "the keys of the samples that a rank reads in training, in order, one a line",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each action."""
    add_actions(parser, __name__, ACTIONS)


run = run_action
