"""One rank of the test against DeepSpeed itself: `python -m tests.ranks.universal_ranks OUT_FOLDER EXPORT_FOLDER`.

DeepSpeed's own engine writes checkpoints, which its tool turns into the universal layout, and loads our export.
"""

import argparse
import sys
from pathlib import Path

import torch
from deepspeed.checkpoint import ds_to_universal
from safetensors.torch import save_file

from sret_scale.config.ds_config import load_ds_config
from sret_scale.config.run_config import OptimConfig
from sret_scale.model import SReT, Stage
from sret_scale.train.distributed import barrier, leave, ranks_from_environment
from sret_scale.train.engine.engine import Engine, start_communication
from sret_scale.train.optim import WeightAverage, build_optimizer
from tests.ranks.engine_ranks import ACCUMULATION, MICRO_BATCH, state, train
from tests.tiny import TINY_MODEL

STAGES = ("zero1", "zero2", "zero3")


def make_engine(name: str) -> Engine:
    torch.manual_seed(1)
    model = SReT(TINY_MODEL)
    return Engine(
        model,
        build_optimizer(model, model.parameter_tags(), OptimConfig()),
        {**load_ds_config(name), "checkpoint": {"load_universal": True}},
        micro_batch_size=MICRO_BATCH,
        grad_accum_steps=ACCUMULATION,
        z3_leaf_modules=(Stage,),
    )


def to_universal(source: Path, target: Path) -> None:
    """DeepSpeed's own conversion, in this process."""
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def main(folder: Path, export: Path) -> None:
    ranks = ranks_from_environment()
    start_communication(ranks)
    for name in STAGES:
        engine = make_engine(name)
        train(engine, WeightAverage(engine.local_weights(), 100), range(2), ranks)
        engine._engine.save_checkpoint(str(folder / name), tag="own")
        trained = state(engine, WeightAverage(engine.local_weights(), 100), ranks)
        loaded = make_engine(name)
        loaded._engine.load_checkpoint(str(export))
        rates = {str(group["lr"]) for group in loaded.param_groups}
        again = state(loaded, WeightAverage(loaded.local_weights(), 100), ranks)
        barrier()
        if ranks.is_main:
            assert rates == {str(OptimConfig().learning_rate)}, rates
            to_universal(folder / name / "own", folder / name / "universal")
            for label, sets in (("trained", trained), ("loaded", again)):
                for what in ("weights", "optimizer"):
                    save_file(sets[what], folder / f"{name}.{label}.{what}.safetensors")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
