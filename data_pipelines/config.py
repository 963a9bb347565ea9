"""The settings of the data pipeline, in one frozen dataclass."""

import re
from dataclasses import dataclass
from typing import Literal

from data_pipelines.field_checks import check_fields, require

OrderKind = Literal["full", "block", "sequential"]
LastBatch = Literal["drop", "pad"]
Interpolation = Literal["bilinear", "bicubic"]

# Pillow's own limit (its MAX_IMAGE_PIXELS), so that its warning cannot appear for an image that is accepted.
MAX_PIXELS = 89_478_485

# Per channel, of pixels in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, in which order, and which part of each image is seen.

    train_folder, test_folder: folder or URL of a shard set.
    mixture_folders: more training sets.
    mixture_weights: those of all training sets, that of train_folder first; none: by number of samples.
    tokens: file of a sentencepiece model by which task=translation reads its pairs; null: byte by byte.
        `auto`, in a command or a recipe, takes the one of the training set, where it has one.
    order: `full` permutes whole epochs, `block` shards and a window of samples, `sequential` nothing.
    last: what becomes of samples that fill no global batch.
    block_window: samples that one may be moved by in `block` order: more mixes better, and needs more shards at a time.
    num_repeats: views of each sample in an epoch, all in one global batch (repeated augmentation).
    transform: a transform of your own for each view, as module:function; data_pipelines/image/user_transform.py says
        how it is called.
    workers: decoding threads of one rank (or processes, for a transform that holds the interpreter lock).
    worker_kind: threads or processes.
    prefetch_batches: micro batches that workers may be ahead.
    crop: the training view: `resized` (RandomResizedCrop, antialiased), `padded` (padded with zeros, cut at a
        random place: for small images), `centre` (the view of evaluation) or `none` (in evaluation too: the image as
        it is, in the top left corner of black pixels, never flipped: for images with label maps).
    crop_scale, crop_ratio: share of the area, and width to height, of `resized`.
    crop_padding: pixels of zeros on each side, of `padded`.
    flip_rate: share of training views that are mirrored.
    num_views: epoch e sees view e mod num_views of each image; null draws new views in every epoch.
    view_seed: draws them; null is the run's seed. A store of soft labels needs both, so that a view that it knows comes
        again.
    eval_crop_rate: evaluation resizes the short side to image_size / eval_crop_rate and cuts the centre; 1.0 keeps the
        whole short side.
    interpolation: of every resizing.
    max_pixels: larger images are bad samples.
    remote_reads: of shards at a URL, whole `shards`, or `ranges` of them, one a sample, for small sets.
    cache_folder: the node's cache of such shards; null: the user's cache folder.
    cache_gib: its cap.
    fetch_threads, fetch_ahead_steps: threads that fetch shards, and global batches that they look ahead.
    stall_s, fetch_attempts: how long a read may stand still, and how often it is tried.
    max_bad_rate: training replaces a bad sample by another; above this share of a rank's samples of one epoch, the run
        stops.
    quarantine_file: JSON lines of the samples that were replaced: shard, key, offset, reason. Null: of the run.
    """

    train_folder: str = "shards/train"
    test_folder: str = "shards/test"
    mixture_folders: tuple[str, ...] = ()
    mixture_weights: tuple[float, ...] = ()
    tokens: str | None = None
    order: OrderKind = "full"
    last: LastBatch = "drop"
    block_window: int = 8192
    num_repeats: int = 1
    transform: str | None = None
    workers: int = 2
    worker_kind: Literal["threads", "processes"] = "threads"
    prefetch_batches: int = 4
    crop: Literal["resized", "padded", "centre", "none"] = "resized"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_padding: int = 4
    flip_rate: float = 0.5
    num_views: int | None = None
    view_seed: int | None = None
    eval_crop_rate: float = 0.875
    interpolation: Interpolation = "bicubic"
    max_pixels: int = MAX_PIXELS
    remote_reads: Literal["shards", "ranges"] = "shards"
    cache_folder: str | None = None
    cache_gib: float = 100.0
    fetch_threads: int = 2
    fetch_ahead_steps: int = 64
    stall_s: float = 30.0
    fetch_attempts: int = 6
    max_bad_rate: float = 0.001
    quarantine_file: str | None = None

    def __post_init__(self) -> None:
        num_sets, weights = 1 + len(self.mixture_folders), self.mixture_weights
        is_sound = len(weights) in (0, num_sets) and all(weight > 0 for weight in weights)
        require(is_sound, "data.mixture_weights", f"none, or {num_sets} above 0", weights)
        is_name = self.transform is None or re.fullmatch(r"[\w.]+:\w+", self.transform) is not None
        require(is_name, "data.transform", "module:function, or null", self.transform)
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "data.crop_scale", "0 < low <= high <= 1", self.crop_scale)
        low, high = self.crop_ratio
        require(0 < low <= high, "data.crop_ratio", "0 < low <= high", self.crop_ratio)
        bounds = {
            "at least 1": "block_window num_repeats num_views fetch_threads fetch_ahead_steps fetch_attempts",
            "above 0": "cache_gib stall_s",
            "above 0 and at most 1": "eval_crop_rate",
            "between 0 and 1": "flip_rate max_bad_rate",
            "0 to 4,096": "crop_padding",
            "1 to 1,024": "workers",
            "1 to 1,048,576": "prefetch_batches",
        }
        check_fields(self, "data", bounds)
