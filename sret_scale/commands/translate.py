"""`sret-scale translate`: lines in, their translations out, by a run of a translator."""

import argparse
import itertools
import sys
from pathlib import Path

from sret_scale.commands.arguments import CACHE, WEIGHTS

EXAMPLE = """examples:
  sret-scale translate runs/nmt < in.de > out.en
  sret-scale translate runs/nmt --beam 5 --loops 6 < in.de > out.en"""

_LINES_AT_A_TIME = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run and how a translation is chosen."""
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--beam", type=int, default=1, help="beginnings that are kept; 1 is greedy (default: 1)")
    parser.add_argument("--loops", type=int, help="loops of the stage that has most, the others in proportion")
    parser.add_argument("--cache", **CACHE)
    parser.add_argument("--weights", **WEIGHTS)


def run(args: argparse.Namespace) -> None:
    """Print a line for every line of the input."""
    import torch

    from data_pipelines.text.tokens import tokens_of
    from sret_scale.model.text.decoding import as_translator
    from sret_scale.tasks.translation import check_beam, translated
    from sret_scale.train.evaluate_main import load_model_of
    from sret_scale.train.load_run import load_config

    check_beam(args.beam)
    if args.loops is not None and args.loops < 1:
        raise ValueError(f"--loops: expected at least 1, got {args.loops}")
    model = as_translator(load_model_of(args.run, args.weights, args.loops)[0], "translate")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tokens, number = tokens_of(load_config(args.run).data.tokens), 1
    while lines := [line.rstrip(b"\r\n") for line in itertools.islice(sys.stdin.buffer, _LINES_AT_A_TIME)]:
        for place, line in enumerate(lines):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number + place}: expected text in UTF-8 ({error.reason})") from error
        for text in translated(model, tokens, lines, beam=args.beam, cache=args.cache, first=number):
            sys.stdout.buffer.write(text + b"\n")
        sys.stdout.buffer.flush()
        number += len(lines)
