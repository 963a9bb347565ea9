"""`shards write --hostfile`: the same command on several nodes, which share the work by the claims in the target.

    here --(one line of JSON on stdin, which then stays open)--> this module on each host --> shards write

Nothing of a path or an argument meets a shell, and when the connection ends, the host stops writing.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from sret_scale.runs.rank_errors import in_words

_LOCAL_NAMES = ("localhost", "127.0.0.1")
_LOOK_EVERY_S = 0.2

# What `shards write` reads of its arguments.
_PATHS = ("source", "target")
_WANTED = (
    *("kind", "split", "seed", "keep_order", "shard_mb", "shard_samples", "no_metadata", "on_bad", "max_bad_rate"),
    *("check", "hash", "resize", "quality", "workers", "classes"),
)


def write_on_hosts(hostfile: Path, args: argparse.Namespace) -> None:
    """Runs `shards write` with these arguments on all hosts of the file, here where it names this machine.

    Raises OSError that names the host and its error when one fails. What was written stays; the same command continues.
    """
    from sret_scale.launch.hostfile import read_hostfile

    values = {name: getattr(args, name) for name in _WANTED} | {name: str(getattr(args, name)) for name in _PATHS}
    order = json.dumps({"folder": str(Path.cwd()), "arguments": values}) + "\n"
    with contextlib.ExitStack() as stack:
        said = {host.name: stack.enter_context(tempfile.TemporaryFile("w+")) for host in read_hostfile(hostfile)}
        nodes = {
            name: subprocess.Popen(_command(name), stdin=subprocess.PIPE, stdout=file, stderr=file, text=True)
            for name, file in said.items()
        }
        for node in nodes.values():
            stack.callback(_end, node)
            assert node.stdin is not None
            # One that has ended already says why by its exit status and its last words.
            with contextlib.suppress(BrokenPipeError):
                node.stdin.write(order)
                node.stdin.flush()
        failed = _first_failed(nodes)
        for name in [failed] if failed else said:
            said[name].seek(0)
            lines = said[name].read().strip().splitlines() or ["it ended without a word"]
            if failed:
                raise OSError(f"host {failed}: {lines[-1].removeprefix('error: ')}")
            print(f"{name}: {lines[-1]}")


def _command(name: str) -> list[str]:
    from sret_scale.launch.nodes import ssh_command

    own = [sys.executable, "-P", "-m", "sret_scale.commands.shards.nodes"]
    if name in {*_LOCAL_NAMES, socket.gethostname()}:
        return own
    return ssh_command(name, shlex.join(["env", f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}", *own]))


def _first_failed(nodes: dict[str, "subprocess.Popen[str]"]) -> str | None:
    """Waits until all nodes have ended well (None) or one has failed (its name)."""
    while True:
        codes = {name: node.poll() for name, node in nodes.items()}
        for name, code in codes.items():
            if code:
                return name
        if all(code == 0 for code in codes.values()):
            return None
        time.sleep(_LOOK_EVERY_S)


def _end(node: "subprocess.Popen[str]") -> None:
    """Closing stdin stops the host; killing ssh alone would not."""
    assert node.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        node.stdin.close()
    node.wait()


def main() -> int:
    """On a host: reads the order, then writes until done or until stdin closes."""
    from sret_scale.commands.shards.write import run

    order = json.loads(_read_line())
    os.chdir(order["folder"])
    threading.Thread(target=_stop_when_closed, daemon=True).start()
    values = order["arguments"] | {name: Path(order["arguments"][name]) for name in _PATHS}
    try:
        run(argparse.Namespace(**values, hostfile=None))
    except (ValueError, OSError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        return 2
    return 0


def _read_line() -> bytes:
    # Not through sys.stdin: a thread that waits inside it would block the end of the process.
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            raise SystemExit("no order on stdin")
        line += byte
    return line


def _stop_when_closed() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
