"""`sret-scale shards head`: a picture of the first images with their labels."""

import argparse
from pathlib import Path

EXAMPLE = "example: sret-scale shards head shards/fashion/train head.png --count 24"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, the picture and which images."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the shard set")
    parser.add_argument("picture", type=Path, metavar="PICTURE", help="PNG file to write")
    parser.add_argument("--from", type=int, default=0, dest="first", help="first image (default: 0)")
    parser.add_argument("--count", type=int, default=48, help="number of images (default: 48)")


def run(args: argparse.Namespace) -> None:
    """Draw the sheet and save it."""
    from data_pipelines.checked_files import printable
    from data_pipelines.upkeep.contact_sheet import draw_contact_sheet

    sheet = draw_contact_sheet(args.folder, first=args.first, num_images=args.count)
    sheet.save(args.picture, "PNG")
    print(printable(f"{args.picture}: {sheet.width} x {sheet.height} pixels"))
