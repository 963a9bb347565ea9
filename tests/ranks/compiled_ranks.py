"""One rank of the test of compiled blocks: `python -m tests.ranks.compiled_ranks OUT_FOLDER`.

Every ZeRO stage trains recomputed steps, eager and compiled, from one start; the graphs are counted.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounterWithBackend

from sret_scale.memory import MemoryConfig, apply_recomputation
from sret_scale.model import SReT, StageConfig
from sret_scale.model.compiled_blocks import compile_blocks
from sret_scale.train.distributed import leave, ranks_from_environment
from sret_scale.train.engine.engine import start_communication
from sret_scale.train.optim import WeightAverage
from tests.ranks.engine_ranks import DS_CONFIGS, make_engine, state, train
from tests.tiny import TINY_MODEL

STAGE = StageConfig(width=16, num_heads=2, num_blocks=1, num_loops=3, groups=(1,))


def main(folder: Path) -> None:
    ranks = ranks_from_environment()
    start_communication(ranks)
    # Two graphs are enough to see how DeepSpeed and a compiler share parameters.
    config = replace(TINY_MODEL, stages=(STAGE,))
    for name in DS_CONFIGS:
        counter = CompileCounterWithBackend("aot_eager")
        for label in ("eager", "compiled"):
            engine = make_engine(name, config)
            assert isinstance(engine.model, SReT)
            apply_recomputation(engine.model, MemoryConfig(schedule="per_application"))
            if label == "compiled":
                torch._dynamo.reset()
                assert compile_blocks(engine.model, backend=counter) is None
            average = WeightAverage(engine.local_weights(), 100)
            train(engine, average, range(1), ranks)
            graphs = counter.frame_count
            train(engine, average, range(1, 3), ranks)
            found = state(engine, average, ranks)["weights"]
            found["graphs"] = torch.tensor([graphs, counter.frame_count])
            if ranks.is_main:
                save_file(found, folder / f"{name}.{label}.safetensors")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
