"""`sret-scale generate`: a run of a language model goes on with a text."""

import argparse
import itertools
import math
import sys
from pathlib import Path

from sret_scale.commands.arguments import CACHE, WEIGHTS

EXAMPLE = """examples:
  sret-scale generate runs/lm --prompt "HAMLET." --tokens 400
  sret-scale generate runs/lm --temperature 0 --loops 8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, the prompt and how bytes are chosen."""
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--prompt", default="", help="text to go on with; of a longer one than the context, its end")
    parser.add_argument("--tokens", type=int, default=400, help="bytes to write (default: 400)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest byte, 1 draws as learned (default: 0.8)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--loops", type=int, help="loops of the stage that has most, the others in proportion")
    parser.add_argument("--cache", **CACHE)
    parser.add_argument("--weights", **WEIGHTS)


def run(args: argparse.Namespace) -> None:
    """Print the prompt and what follows, byte by byte."""
    import torch

    from sret_scale.model.text.generation import as_next_byte, continuation, reader_of
    from sret_scale.train.evaluate_main import load_model_of

    for name, least in (("tokens", 1), ("seed", 0), ("loops", 1)):
        if (value := getattr(args, name)) is not None and not least <= value < 1 << 63:
            raise ValueError(f"--{name}: expected at least {least}, got {value}")
    if not (args.temperature == 0 or 1e-3 <= args.temperature < math.inf):
        raise ValueError(f"--temperature: expected 0, or 0.001 and more, got {args.temperature:g}")
    model = as_next_byte(load_model_of(args.run, args.weights, args.loops)[0], "generate")
    prompt = args.prompt.encode("utf-8", "surrogateescape")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reader_of(model, args.cache)  # What it refuses, it refuses before anything is written.
    options = {"temperature": args.temperature, "seed": args.seed, "cache": args.cache}
    written = continuation(model.to(device), prompt, **options)
    sys.stdout.buffer.write(prompt)
    # Bytes as they come: a character may be several of them, and a model may write what is none.
    for byte in itertools.islice(written, args.tokens):
        sys.stdout.buffer.write(bytes([byte]))
        sys.stdout.buffer.flush()
    sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()
