"""Hops, a text on which loops pay: where does a letter lead after k steps of a map that the line itself gives?

    python experiments/hops.py runs/hops --loops 1 4 --seeds 0 1 2

A line is `hdagbfce3ac2fb...`: a permutation of eight letters (a leads to h, b to d, ...), then questions: a number of
hops, 1 to 4, a letter, and the answer. A hop is one look at the map, and composing takes depth; a question that its
line has had before does not, so those are not counted. Maps, numbers and letters cannot be foretold, but of 40,320
maps the training has nearly all. One tied block without projections, norm outside the branches and steps of size 1,
reads such lines byte by byte. Arms differ in how often it is applied (and where that is once, two coefficients of the
stream are learned, `skip: by_depth`). A last arm has as many multiply-adds as the deepest and one application: a wider
feed-forward. All have one rate, which pilots with loops chose.

What would refute it, written down before the runs: at the most loops, the share of right answers to 2 and to 3 hops is
not above that of 1 loop, and of the wide arm, by 10 points in every seed. The floor is who says that a letter leads to
itself (it does after k hops where the length of its cycle divides k). Tested with other loops than those of training,
too. Each model is some lines of OUTPUT/hops.csv; the same command continues.
"""

import argparse
import csv
import random
from dataclasses import replace
from pathlib import Path

import torch

from data_pipelines.text.pieces import TextWindows
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.config.recipes import recipe
from sret_scale.config.run_config import RunConfig
from sret_scale.launch.preflight import start_run
from sret_scale.model import StageConfig, TextConfig, describe
from sret_scale.model.text.token_model import TokenModel
from sret_scale.train.evaluate_main import load_model_of

LETTERS, MOST_HOPS, NUM_QUESTIONS, WIDTH = "abcdefgh", 4, 16, 64
CONTEXT = len(LETTERS) + 3 * NUM_QUESTIONS + 1
NUM_LINES = {"train": 128_000, "dev": 500, "test": 2_000}
FIELDS = ("arm", "loops", "seed", "tested_with", "parameters", "macs", *(f"hops_{k}" for k in range(1, 1 + MOST_HOPS)))
Answer = tuple[int, int]
"""Where in a line the byte of an answer to a new question stands, and how many hops are asked."""


def line(rng: random.Random) -> tuple[str, list[Answer]]:
    """CONTEXT bytes with a line feed, and the answers in them."""
    table = "".join(rng.sample(LETTERS, len(LETTERS)))
    text, answers, asked = table, [], set()
    for _ in range(NUM_QUESTIONS):
        hops, letter = rng.randint(1, MOST_HOPS), rng.choice(LETTERS)
        end = letter
        for _ in range(hops):
            end = table[LETTERS.index(end)]
        text += f"{hops}{letter}{end}"
        if (hops, letter) not in asked:
            answers.append((len(text) - 1, hops))
        asked.add((hops, letter))
    return text + "\n", answers


def config_of(output: Path, arm: str, loops: int, seed: int) -> RunConfig:
    """A run of `lm_tiny`'s recipe with the model of an arm."""
    config, lines = recipe("lm_tiny").config, NUM_LINES["train"]
    stage = StageConfig(
        width=WIDTH, num_heads=4, num_blocks=1, num_loops=loops, projections="none", norm_placement="outer"
    )
    if arm == "wide":
        # A loop has 4 D^2 + 2 D F of products and N D of looking back; those of all loops but one go into F.
        added = (loops - 1) * (4 * WIDTH + CONTEXT + 2 * stage.hidden_width) // 2
        stage = replace(stage, num_loops=1, mlp_ratio=(stage.hidden_width + added) / WIDTH)
    return replace(
        config,
        model=TextConfig(stages=(stage,), context=CONTEXT),
        data=replace(
            config.data, train_folder=str(output / "shards" / "train"), test_folder=str(output / "shards" / "dev")
        ),
        optim=replace(config.optim, learning_rate=3e-3, warmup_images=lines // 40, weight_decay=0.01),
        train=replace(
            config.train,
            total_images=lines,
            global_batch_size=32,
            micro_batch_size=32,
            checkpoint_interval_images=lines // 4,
            seed=seed,
        ),
    )


@torch.inference_mode()
def right_shares(model: TokenModel, lines: list[tuple[str, list[Answer]]]) -> list[float]:
    """The share of right answers to 1, 2, ... hops."""
    right, asked = [0] * MOST_HOPS, [0] * MOST_HOPS
    for start in range(0, len(lines), 100):
        part = lines[start : start + 100]
        rows = torch.tensor([[0, *text.encode()] for text, _ in part])
        likeliest = model.forward_head(model.forward_features(rows)).argmax(dim=-1)
        for row, (text, answers) in enumerate(part):
            for place, hops in answers:
                right[hops - 1] += likeliest[row, place].item() == ord(text[place])
                asked[hops - 1] += 1
    return [found / number for found, number in zip(right, asked, strict=True)]


def floor(lines: list[tuple[str, list[Answer]]]) -> list[float]:
    """The share of answers that are the letter itself."""
    found: list[list[bool]] = [[] for _ in range(MOST_HOPS)]
    for text, answers in lines:
        for place, hops in answers:
            found[hops - 1].append(text[place] == text[place - 1])
    return [sum(same) / len(same) for same in found]


def main() -> None:
    """Make the models that the table lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    output: Path = arguments.output
    made = {}
    for number, (part, count) in enumerate(NUM_LINES.items()):
        rng = random.Random(number)
        made[part] = [line(rng) for _ in range(count)]
        file = output / "texts" / part / "lines.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(text for text, _ in made[part]))
        text = TextWindows(window=CONTEXT)
        write_shards(WriteConfig(kind="text", source=file.parent, text=text), output / "shards" / part)
    table = output / "hops.csv"
    rows = list(csv.DictReader(table.open(newline=""))) if table.exists() else []
    done = {(row["arm"], row["loops"], row["seed"]) for row in rows}
    arms = [("tied", loops) for loops in arguments.loops] + [("wide", max(arguments.loops))]
    with table.open("a", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if not rows:
            writer.writerow(FIELDS)
            writer.writerow(["the letter itself", *[""] * 5, *(f"{share:.4f}" for share in floor(made["test"]))])
        for seed in arguments.seeds:
            for arm, loops in arms:
                if (arm, str(loops), str(seed)) in done:
                    continue
                run, config = output / f"{arm}-{loops}-{seed}", config_of(output, arm, loops, seed)
                if start_run(config, run, num_ranks=1):
                    raise SystemExit(f"{run} failed: see its logs")
                facts, found = describe(config.model), []
                for tested in sorted({1, loops // 2, loops, 2 * loops} - {0}) if arm == "tied" else [1]:
                    model = load_model_of(run, None, tested)[0]
                    assert isinstance(model, TokenModel)
                    shares = [f"{share:.4f}" for share in right_shares(model.eval(), made["test"])]
                    found.append([arm, loops, seed, tested, facts["parameters"], facts["macs"], *shares])
                writer.writerows(found)
                stream.flush()


if __name__ == "__main__":
    main()
