"""Everything that is checked before a run's processes start, and their start."""

import json
import shutil
import tempfile
from pathlib import Path

import torch

from data_pipelines.remote import open_data, open_training_data
from sret_scale.distill.spec import parse_teacher
from sret_scale.memory import prepare_memory
from sret_scale.model import SReT, describe
from sret_scale.train.config import RunConfig, differences, from_yaml, grad_accum_steps, to_yaml
from sret_scale.train.ds_config import load_ds_config, precision_of, zero_stage_of
from sret_scale.train.launcher import launch
from sret_scale.train.node.places import choose_nodes
from sret_scale.train.run_folder import EXIT_FINISHED, RunFolder, environment, write_json


def start_run(
    config: RunConfig,
    path: Path,
    *,
    num_ranks: int | None = None,
    hostfile: Path | None = None,
    is_fresh: bool = False,
    dry_run: bool = False,
) -> int:
    """Check `config`, make or continue the run folder, start the ranks, wait; returns the run's exit status.

    Raises ValueError or OSError, before anything is started or written, for what can be known to be wrong.
    """
    place = choose_nodes(num_ranks=num_ranks, hostfile=hostfile, master_port=None)
    world_size = sum(len(host.devices) for host in place.hosts)
    check_run(config, world_size)
    if dry_run:
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / "config.yaml"
            file.write_text(to_yaml(config), encoding="utf-8")
            return launch(path, file, num_ranks=num_ranks, hostfile=hostfile, dry_run=True)
    folder = RunFolder(path)
    path.mkdir(parents=True, exist_ok=True)
    # Released again for rank 0, which holds it for the length of the run.
    with folder.locked():
        if is_fresh:
            remove_results(folder)
        check_configuration(folder, config)
        if is_finished(folder):
            print(f"{path} is finished: {config.train.total_images:,} images; --fresh runs it again")
            return EXIT_FINISHED
        write_description(folder, config, world_size)
    return launch(path, folder.config, num_ranks=num_ranks, hostfile=hostfile)


def check_run(config: RunConfig, world_size: int) -> None:
    """Raise ValueError or OSError where shards, classes, batch, memory, ds_config or teacher do not fit together."""
    grad_accum_steps(config.train, world_size)
    ds_config = load_ds_config(config.engine.ds_config)
    if config.memory.budget_bytes is not None:
        with torch.device("meta"):
            model = SReT(config.model)
        prepare_memory(
            model,
            config.memory,
            micro_batch_size=config.train.micro_batch_size,
            precision=precision_of(ds_config),
            world_size=world_size,
            zero_stage=zero_stage_of(ds_config),
        )
    sets = {"train": open_training_data(config.data), "test": open_data(config.data.test_folder, config.data)}
    for name, shards in sets.items():
        if shards.num_classes != config.model.num_classes:
            raise ValueError(
                f"the {name} shards {shards.folder} have {shards.num_classes} classes, the model has "
                f"{config.model.num_classes}: set model.num_classes={shards.num_classes}"
            )
        if name == "train" and shards.num_samples < config.train.global_batch_size:
            raise ValueError(
                f"{shards.folder} has {shards.num_samples} samples, fewer than one global batch of "
                f"{config.train.global_batch_size} for {world_size} ranks: use fewer ranks or a smaller batch"
            )
    if config.train.total_images < config.train.global_batch_size:
        raise ValueError(
            f"train.total_images={config.train.total_images} is less than one global batch of "
            f"{config.train.global_batch_size}"
        )
    if config.distill.teacher:
        for part in parse_teacher(config.distill.teacher):
            if part.kind == "run" and not (Path(part.value) / "config.yaml").exists():
                raise FileNotFoundError(f"teacher {part.text!r}: {part.value} is not a run folder (no config.yaml)")


def check_configuration(folder: RunFolder, config: RunConfig) -> None:
    """Raise ValueError where the folder holds a run of another configuration."""
    if folder.config.exists():
        changed = differences(from_yaml(folder.config), config)
        if changed:
            raise ValueError(
                f"{folder.path} holds a run of another configuration: {'; '.join(changed[:5])}"
                f"{' ...' if len(changed) > 5 else ''} (there -> asked for): choose another --run, or add --fresh"
            )


def write_description(folder: RunFolder, config: RunConfig, world_size: int) -> None:
    """What is computed, by what, and how large it is."""
    folder.config.write_text(to_yaml(config), encoding="utf-8")
    write_json(folder.model, describe(config.model))
    write_json(folder.environment, environment(world_size))


def is_finished(folder: RunFolder) -> bool:
    """True when the run of this folder came to its end, its last evaluation included."""
    if not folder.status.exists():
        return False
    return json.loads(folder.status.read_text(encoding="utf-8")).get("state") == "finished"


def remove_results(folder: RunFolder) -> None:
    """Delete what an earlier run left in the folder; other files stay."""
    for name in ("logs", "errors", "heartbeats", "tensorboard"):
        shutil.rmtree(folder.path / name, ignore_errors=True)
    if folder.checkpoints.exists():
        shutil.rmtree(folder.checkpoints)
    for file in (folder.config, folder.model, folder.environment, folder.metrics, folder.status, folder.quarantine):
        file.unlink(missing_ok=True)
