"""The `sret-scale` command: finds the sub-command that was asked for and runs it.

Only the module of that sub-command is imported, so that `--help` answers at once: torch and deepspeed cost seconds.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence

from data_pipelines.home_folder import with_home
from sret_scale import __version__
from sret_scale.commands import COMMANDS
from sret_scale.commands.arguments import parsed
from sret_scale.launch.output import open_missing_streams, outlast
from sret_scale.runs.rank_errors import in_words


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status: 0, what the command returned, or 2 for a bad input.

    Without `argv` it is this process's command: one whose product is in files goes on when its output cannot be
    written; any other says so, or ends silently where its reader (`| head`) has left.
    """
    if argv is not None:
        return _run(argv)
    words = sys.argv[1:]
    open_missing_streams()
    outlast("stderr")
    is_printed = any(word.startswith("--dry") for word in words)
    if not is_printed and (words[:1] in (["train"], ["sweep"], ["demo"]) or words[1:2] == ["write"]):
        outlast("stdout")
    status = _run(words)
    try:
        sys.stdout.flush()
    except OSError as error:
        # Nor must flushing at exit fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return status or 1
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return status or 2
    return status


def _run(argv: Sequence[str]) -> int:
    if list(argv[:2]) != ["labels", "write"]:
        # Left over from another launcher: this process is no rank, and gives its own ranks theirs.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    top = argparse.ArgumentParser(
        prog="sret-scale",
        description="Train Sliced Recursive Transformers of 20 to more than 1000 block applications.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<11} {text}" for name, text in COMMANDS.items())
        + "\n\nexample: sret-scale describe sret_t",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"sret-scale {__version__}")
    top.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    if not argv:
        top.print_help(sys.stderr)
        return 2
    if not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = "".join(f"did you mean {name}? " for name in difflib.get_close_matches(argv[0], COMMANDS, n=1))
        print(f"error: unknown command {argv[0]!r}: {near}see sret-scale --help", file=sys.stderr)
        return 2
    command = top.parse_args(argv[:1]).command
    try:
        words = [with_home(word) for word in argv[1:]]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args = parsed(command, words)
    try:
        status = args.run_command(args)
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        # A user's mistake or a machine's refusal: its message says what to do, a traceback would hide it.
        if args.debug:
            raise
        print(f"error: {in_words(error)}", file=sys.stderr)
        return 2
    return int(status or 0)


if __name__ == "__main__":
    sys.exit(main())
