"""A rank of the test that recomputation changes nothing under ZeRO: `python -m tests.ranks.memory_ranks OUT_FOLDER`."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sret_scale.config.run_config import OptimConfig
from sret_scale.memory import MemoryConfig, apply_recomputation
from sret_scale.memory.config import stem_repeats_norms
from sret_scale.model import Noise, StackConfig, Stage
from sret_scale.train.distributed import leave, ranks_from_environment
from sret_scale.train.engine.engine import Engine, start_communication
from sret_scale.train.optim import build_optimizer
from tests.memory.test_memory_sret import MODELS, make_model

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
MEMORY = {"plain": None, "binomial": MemoryConfig(schedule="binomial", slots=2), "none": MemoryConfig(schedule="none")}


def train(
    config: StackConfig, ds_config: dict[str, Any], memory: MemoryConfig | None, rank: int
) -> dict[str, torch.Tensor]:
    """Weights after two updates of two micro-steps each."""
    model = make_model(config)
    if memory is not None:
        zero_stage = ds_config["zero_optimization"]["stage"]
        apply_recomputation(model, memory, repeats_norms=stem_repeats_norms(memory, zero_stage))
    optimizer = build_optimizer(model, model.parameter_tags(), OptimConfig(learning_rate=1e-3))
    engine = Engine(model, optimizer, ds_config, micro_batch_size=2, grad_accum_steps=2, z3_leaf_modules=(Stage,))
    for micro_step in range(4):
        seed = 10 * micro_step + rank
        images = torch.randn(config.example(2).shape, generator=torch.Generator().manual_seed(seed))
        logits = engine.forward(images, Noise(permutation_seed=micro_step, sample_seed=seed))
        engine.backward(logits.float().square().mean())
        engine.step()
    return engine.weights()


def main(folder: Path) -> None:
    ranks = ranks_from_environment()
    start_communication(ranks)
    for name in ("zero0", "zero1", "zero1_autocast", "zero2", "zero3"):
        ds_config = json.loads((DS_CONFIGS / f"{name}.json").read_text())
        if name == "zero3":
            # The shipped threshold keeps parameters of this size whole; here they must really be partitioned.
            ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        for (kind, config), (label, memory) in itertools.product(MODELS.items(), MEMORY.items()):
            weights = train(config, ds_config, memory, ranks.rank)
            if ranks.is_main:
                save_file(weights, folder / f"{kind}.{name}.{label}.safetensors")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
