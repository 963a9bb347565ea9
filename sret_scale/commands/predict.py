"""`sret-scale predict`: what a trained model sees on images."""

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Iterator
from glob import glob, has_magic
from pathlib import Path

EXAMPLE = """examples:
  sret-scale predict runs/sret_t photo.jpg
  sret-scale predict runs/sret_t photos 'more/*.png' --top 3 --csv > answers.csv
  sret-scale predict sret_t.safetensors photos --json"""

# What is taken of a folder; a file that is named is tried whatever it is called.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the images, and the form of the answer."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, one of its checkpoints, or safetensors")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders of them, or quoted patterns")
    parser.add_argument("--top", type=int, default=5, help="classes to name for each image (default: 5)")
    parser.add_argument(
        "--weights",
        choices=("raw", "ema", "best"),
        help="of a run: which weights (default: the moving average, if kept)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print CSV: a row an image, its classes from left to right")
    form.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the classes of every image; 2 where one could not be read, which is said and passed over."""
    from data_pipelines.checked_files import printable
    from sret_scale.lab.trained_model import load
    from sret_scale.runs.rank_errors import in_words

    if args.top < 1:
        raise ValueError(f"--top: expected at least 1, got {args.top}")
    files = list(image_files(args.images))
    model = load(args.run, args.weights)
    top = min(args.top, len(model.class_names))
    table = csv.writer(sys.stdout, lineterminator="\n")
    if args.csv:
        table.writerow(
            ["image", *(f"{what}_{place}" for place in range(1, top + 1) for what in ("class", "probability"))]
        )
    answers, status = [], 0
    for file, found in model.predict_files(files, top=top):
        if not isinstance(found, list):
            reason = in_words(found)
            print(printable(f"error: {reason if str(file) in reason else f'{file}: {reason}'}"), file=sys.stderr)
            status = 2
        elif args.json:
            ranked = [{"class": name, "probability": round(value, 6)} for name, value in found]
            answers.append({"image": str(file), "classes": ranked})
        elif args.csv:
            table.writerow([file, *(cell for name, value in found for cell in (name, f"{value:.6f}"))])
        else:
            print(printable(f"{file}: " + ", ".join(f"{name} {value:.1%}" for name, value in found)), flush=True)
    if args.json:
        print(json.dumps(answers, indent=1))
    return status


def image_files(words: Iterable[str]) -> Iterator[Path]:
    """The files that words name, folders with all that is below them; FileNotFoundError where a word names none."""
    for word in words:
        is_pattern = has_magic(word) and not Path(word).exists()
        places = sorted(glob(word, recursive=True)) if is_pattern else [word]  # noqa: PTH207 (it may be absolute)
        found = [file for place in places for file in (_images_below(Path(place)) if Path(place).is_dir() else [place])]
        if not found:
            raise FileNotFoundError(f"no images {word}: expected files, a pattern of some, or a folder with {SUFFIXES}")
        yield from map(Path, found)


def _images_below(folder: Path) -> list[Path]:
    """Sorted; nothing that is hidden."""
    files = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    return sorted(file for file in files if not any(part[0] == "." for part in file.relative_to(folder).parts))
