"""Pairs of LibreOffice's help, split by page, as shards for a translator; and what translations cost without a model.

    apt-get download libreoffice-help-de libreoffice-help-en-us
    for package in *.deb; do dpkg-deb -x $package help; done
    python experiments/translation.py help/usr/share/libreoffice/help runs/help
    sret-scale train nmt_tiny --run runs/nmt data.train_folder=runs/help/shards/train \
        data.test_folder=runs/help/shards/dev
    sret-scale evaluate runs/nmt --shards runs/help/shards/test

The help is under the Mozilla Public License 2.0; these pairs of it ship in `data_pipelines/sample`. A page is a file of
the same name in both languages, and paragraphs of equal ids are a pair. 120 pages are for testing and 80 for choosing,
drawn by seed 0. Test pairs are left out whose source or target, in lower case without digits and punctuation, occurs in
training, and those under 20 characters. Floors, by sacrebleu, go into OUTPUT/floors.csv: the source itself, and the
translation of the training sentence whose words are most alike (cosine of tf-idf), of any length or of at least 0.8 of
the source's; and all of them for the novel test pairs alone, few of whose 4-grams of words occur in training. A model's
translations are scored beside them:

    cut -f1 runs/help/test.tsv | sret-scale translate runs/nmt --beam 5 > runs/help/test.hyp
    python experiments/translation.py help/usr/share/libreoffice/help runs/help --translations runs/help/test.hyp
"""

import argparse
import csv
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from data_pipelines.text.pieces import TextWindows
from data_pipelines.writing.prepare import ImageOptions
from data_pipelines.writing.write import WriteConfig, write_shards

NUM_TEST, NUM_DEV = 120, 80
SHORTEST, LONGEST = 12, 400
MOST_SEEN = 0.25
VOCABULARY = 4000

Pair = tuple[str, str]


class Paragraphs(HTMLParser):
    """The texts of a page by the ids of its paragraphs and headings. Of what differs by system, macOS is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self._open: list[tuple[str, str | None, bool]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("br", "img", "meta", "input", "link", "hr", "col"):
            return
        named = dict(attrs)
        name, is_hidden = self._open[-1][1:] if self._open else (None, False)
        if re.match(r"(par|hd)_id", own := named.get("id") or ""):
            name = own
            self.texts.setdefault(name, [])
        self._open.append((tag, name, is_hidden or named.get("class") == "MAC"))

    def handle_endtag(self, tag: str) -> None:
        for place in reversed(range(len(self._open))):
            if self._open[place][0] == tag:
                del self._open[place:]
                return

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][1] is not None and not self._open[-1][2]:
            self.texts[self._open[-1][1]].append(data)


def texts_of(page: Path) -> dict[str, str]:
    """The paragraphs of a page by id, white space made single spaces."""
    parser = Paragraphs()
    parser.feed(page.read_text(encoding="utf-8"))
    return {name: " ".join("".join(parts).split()) for name, parts in parser.texts.items()}


def plain(text: str) -> str:
    """What makes two texts the same here: letters and single spaces, in lower case."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


def pages_of(folder: Path, source: str, target: str) -> dict[str, list[Pair]]:
    """The pairs of every page that is there in both languages."""
    found = {}
    for page in sorted((folder / source / "text").rglob("*.html")):
        other = folder / target / page.relative_to(folder / source)
        if other.exists():
            texts, translations = texts_of(page), texts_of(other)
            pairs = [(text, translations[name]) for name, text in texts.items() if name in translations]
            kept = [pair for pair in pairs if all(SHORTEST <= len(side) <= LONGEST for side in pair)]
            if kept:
                found[str(page.relative_to(folder / source))] = kept
    return found


def split(pages: dict[str, list[Pair]]) -> dict[str, list[Pair]]:
    """Pairs of `train`, `dev` and `test`, each once."""
    names = sorted(pages)
    random.Random(0).shuffle(names)
    parts = {
        "test": names[:NUM_TEST],
        "dev": names[NUM_TEST : NUM_TEST + NUM_DEV],
        "train": names[NUM_TEST + NUM_DEV :],
    }
    found = {part: list(dict.fromkeys(pair for name in parts[part] for pair in pages[name])) for part in parts}
    seen = [{plain(pair[side]) for pair in found["train"]} for side in (0, 1)]
    for part in ("dev", "test"):
        found[part] = [
            pair
            for pair in found[part]
            if all(len(side) >= 20 for side in pair) and not any(plain(pair[side]) in seen[side] for side in (0, 1))
        ]
    return found


def nearest(training: list[Pair], sources: Iterable[str], least: float) -> list[str]:
    """The target of the training pair whose source is most alike, of at least `least` times the words."""
    bags = [Counter(plain(source).split()) for source, _ in training]
    count = Counter(word for bag in bags for word in bag)
    weight = {word: math.log(len(bags) / number) for word, number in count.items()}
    norms = [math.sqrt(sum((n * weight[word]) ** 2 for word, n in bag.items())) or 1.0 for bag in bags]
    having: dict[str, list[int]] = defaultdict(list)
    for place, bag in enumerate(bags):
        for word in bag:
            having[word].append(place)
    found = []
    for source in sources:
        bag, scores = Counter(plain(source).split()), defaultdict[int, float](float)
        for word, number in bag.items():
            for place in having.get(word, ()):
                scores[place] += number * bags[place][word] * weight[word] ** 2
        kept = [place for place in scores if bags[place].total() >= least * bag.total()]
        best = max(kept, key=lambda place: scores[place] / norms[place], default=None)
        found.append("" if best is None else training[best][1])
    return found


def seen_shares(training: list[Pair], test: list[Pair]) -> list[float]:
    """Of each test source the share of its 4-grams of words that occur in training sources; 0 for one without any."""

    def grams(text: str) -> list[tuple[str, ...]]:
        words = plain(text).split()
        return [tuple(words[place : place + 4]) for place in range(len(words) - 3)]

    known = {gram for source, _ in training for gram in grams(source)}
    found = ([gram in known for gram in grams(source)] for source, _ in test)
    return [sum(seen) / max(1, len(seen)) for seen in found]


def floors(training: list[Pair], test: list[Pair]) -> dict[str, list[str]]:
    """Translations of the test sources without a model, by name."""
    sources = [source for source, _ in test]
    return {
        "copy of the source": sources,
        "nearest training sentence": nearest(training, sources, 0.0),
        "nearest of at least 0.8 of the length": nearest(training, sources, 0.8),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("help", type=Path, help="the packages' folder of languages")
    parser.add_argument("output", type=Path)
    parser.add_argument("--translations", type=Path, help="of the sources of OUTPUT/test.tsv, a line each: scored too")
    parser.add_argument("--source", default="de")
    parser.add_argument("--target", default="en-US")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    found = split(pages_of(arguments.help, arguments.source, arguments.target))
    for part, pairs in found.items():
        file, shards = arguments.output / f"{part}.tsv", arguments.output / "shards" / part
        file.write_text("".join(f"{source}\t{target}\n" for source, target in pairs), encoding="utf-8")
        text, options = TextWindows(window=2 * LONGEST), ImageOptions(metadata=False)
        vocabulary = VOCABULARY if part == "train" else None
        write_shards(WriteConfig(kind="tsv", source=file, text=text, options=options, vocabulary=vocabulary), shards)
        print(f"{part}: {len(pairs):,} pairs, {sum(len(target.split()) for _, target in pairs):,} words of the target")
    texts = floors(found["train"], found["test"])
    if arguments.translations is not None:
        texts["the model"] = arguments.translations.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    novel = [place for place, share in enumerate(seen_shares(found["train"], found["test"])) if share < MOST_SEEN]
    print(
        f"{len(novel):,} of {len(found['test']):,} test sources have under {MOST_SEEN:.0%} of their 4-grams in training"
    )
    with (arguments.output / "floors.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["what", "bleu", "chrf", "bleu_novel", "chrf_novel"])
        for name, lines in texts.items():
            scores = []
            for places in (range(len(found["test"])), novel):
                references = [[found["test"][place][1] for place in places]]
                chosen = [lines[place] for place in places]
                scores += [metric.corpus_score(chosen, references).score for metric in (BLEU(), CHRF())]
            table.writerow([name, *(f"{score:.2f}" for score in scores)])
            print("{}: BLEU {:.2f}, chrF {:.2f}; of novel pairs {:.2f}, {:.2f}".format(name, *scores))


if __name__ == "__main__":
    main()
