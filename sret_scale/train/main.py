"""What every rank runs: `python -m sret_scale.train.main RUN/config.yaml`, started by DeepSpeed's launcher.

Where no launcher started it, the calling process trains alone, as a world of one: under a debugger, for example.
"""

import argparse
import contextlib
from pathlib import Path

from sret_scale.runs.run_folder import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, RunFolder, machine
from sret_scale.train.distributed import from_all_ranks, leave, ranks_from_environment
from sret_scale.train.engine.engine import start_communication
from sret_scale.train.load_run import load_config
from sret_scale.train.loop import train


def main() -> None:
    """Train one rank's share of the run in whose folder the configuration lies.

    A stopped run ends with status 0 on every rank, so that no launcher ends the others in the middle of their end; the
    run's own exit status is in status.json.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    config_file: Path = parser.parse_args().config
    if config_file.name != "config.yaml":
        parser.error(f"expected RUN/config.yaml, the run to train, got {config_file}")
    # With the run's own copy of the tokens.
    config = load_config(config_file.parent)
    ranks = ranks_from_environment()
    folder = RunFolder(config_file.parent)
    with folder.locked() if ranks.is_main else contextlib.nullcontext():
        try:
            start_communication(ranks)
            nodes = from_all_ranks(machine() if ranks.local_rank == 0 else None)
            if ranks.is_main:
                folder.record_nodes([node for node in nodes if node])
            is_finished = train(config, folder, ranks)
        except BaseException as error:
            if ranks.is_main:
                folder.write_status("failed", EXIT_FAILED, f"{type(error).__name__}: {error}")
            raise
        if ranks.is_main and is_finished:
            folder.write_status("finished", EXIT_FINISHED)
        elif ranks.is_main:
            folder.write_status("stopped", EXIT_STOPPED, "a signal asked for it")
        leave()


if __name__ == "__main__":
    main()
