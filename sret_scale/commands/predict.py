"""`sret-scale predict`: what a trained model sees on images."""

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import TYPE_CHECKING

from sret_scale.commands.arguments import WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

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
    parser.add_argument("--weights", **WEIGHTS)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print CSV: a row an image, its classes from left to right")
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument(
        "--features", type=Path, metavar="FILE.npz", help="write what the head sees of each image instead of classes"
    )


def run(args: argparse.Namespace) -> int:
    """Print the classes of every image; 2 where one could not be read, which is said and passed over."""
    from data_pipelines.checked_files import printable
    from sret_scale.lab.trained_model import load

    if args.top < 1:
        raise ValueError(f"--top: expected at least 1, got {args.top}")
    files = list(image_files(args.images))
    model = load(args.run, args.weights)
    if args.features:
        return _write_features(args.features, model.features_of_files(files))
    top = min(args.top, len(model.class_names))
    table = csv.writer(sys.stdout, lineterminator="\n")
    if args.csv:
        table.writerow(
            ["image", *(f"{what}_{place}" for place in range(1, top + 1) for what in ("class", "probability"))]
        )
    answers, status = [], 0
    for file, found in model.predict_files(files, top=top):
        if isinstance(found, Exception):
            status = _say_error(file, found)
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


def _write_features(file: Path, found: "Iterable[tuple[str | Path, Tensor | ValueError | OSError]]") -> int:
    """(N, D) `features` and (N,) names of `images`, of those that could be read; 2 where one could not."""
    import numpy as np

    from data_pipelines.atomic_files import replacing

    rows, status = {}, 0
    for image, features in found:
        if isinstance(features, Exception):
            status = _say_error(image, features)
        else:
            rows[str(image)] = features.numpy()
    with replacing(file) as output:
        np.savez(output, features=np.array(list(rows.values())), images=np.array(list(rows)))
    print(f"wrote {file}: features of {len(rows)} images")
    return status


def _say_error(file: str | Path, error: Exception) -> int:
    from data_pipelines.checked_files import printable
    from sret_scale.runs.rank_errors import in_words

    reason = in_words(error)
    print(printable(f"error: {reason if str(file) in reason else f'{file}: {reason}'}"), file=sys.stderr)
    return 2


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
