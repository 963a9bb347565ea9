"""A run small enough to try things on: a few images of the sample data and a model of two tied blocks."""

import gzip
import shutil
from importlib.resources import files
from pathlib import Path

from data_pipelines.image.augment import AugmentConfig
from data_pipelines.stream.loader import DataConfig
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.config.run_config import EngineConfig, OptimConfig, RunConfig, TrainConfig
from sret_scale.memory import MemoryConfig
from sret_scale.model import SReTConfig, StageConfig

NUM_IMAGES = 128

TINY_MODEL = SReTConfig(
    stages=(
        StageConfig(width=16, num_heads=2, num_blocks=1, num_loops=3, groups=(1,)),
        StageConfig(width=32, num_heads=2, num_blocks=1, num_loops=2, groups=(4, 2)),
    ),
    image_size=28,
    num_classes=10,
    stem_strides=(2, 2, 1),
    drop_path=0.1,
)


def tiny_idx(folder: Path) -> Path:
    """A folder of the four IDX files with the first 128 images of each split of the sample data."""
    sample = files("data_pipelines") / "sample" / "fashion_mnist"
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        for kind, header_bytes, item_bytes in (("images-idx3", 16, 28 * 28), ("labels-idx1", 8, 1)):
            content = gzip.decompress((sample / f"{split}-{kind}-ubyte.gz").read_bytes())
            header = content[:4] + NUM_IMAGES.to_bytes(4, "big") + content[8:header_bytes]
            (folder / f"{split}-{kind}-ubyte").write_bytes(header + content[header_bytes:][: NUM_IMAGES * item_bytes])
    shutil.copy(str(sample / "classes.txt"), folder)
    return folder


def tiny_shards(folder: Path) -> Path:
    """Shards of `tiny_idx` in `folder/train` and `folder/test`."""
    source = tiny_idx(folder / "idx")
    for split in ("train", "test"):
        write_shards(WriteConfig(kind="idx", source=source, split=split, shard_samples=50), folder / split)
    return folder


def tiny_config(shards: Path) -> RunConfig:
    """512 images in batches of 32 over two ranks and two accumulation steps, with every kind of randomness on."""
    return RunConfig(
        model=TINY_MODEL,
        data=DataConfig(
            train_folder=str(shards / "train"),
            test_folder=str(shards / "test"),
            crop="padded",
            crop_padding=2,
            eval_crop_rate=1.0,
            workers=1,
        ),
        augment=AugmentConfig(randaugment_ops=1, erase_rate=0.2),
        memory=MemoryConfig(schedule="per_application"),
        optim=OptimConfig(batch_scaling="none", warmup_images=64, ema_horizon_images=200, ema_statistics_images=64),
        engine=EngineConfig(ds_config="zero1"),
        train=TrainConfig(
            total_images=512,
            global_batch_size=32,
            micro_batch_size=8,
            checkpoint_interval_images=96,
            log_interval_steps=1,
        ),
    )
