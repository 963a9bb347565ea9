"""The configuration of a run: one frozen dataclass per component, their sum, and the way from text to it.

A run is a recipe (sret_scale.config.recipes) or a YAML file, plus `section.field=value` overrides. Nothing here runs
code that a file names, and nothing is guessed: an unknown key or a wrong type is an error that names the key, what was
expected and the nearest valid name.
"""

import dataclasses
import difflib
import functools
import json
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import pydantic
import yaml

from data_pipelines.checked_files import read_bounded
from data_pipelines.config import IMAGENET_MEAN, IMAGENET_STD
from data_pipelines.field_checks import check_fields, require
from data_pipelines.home_folder import with_home
from data_pipelines.image.augment import AugmentConfig
from data_pipelines.remote.shard_sets import open_training_data
from data_pipelines.stream.loader import DataConfig
from data_pipelines.text.tokens import TOKENS_NAME
from sret_scale.config.fields import fields_of, kinds_of, suggestion
from sret_scale.config.image_counts import resolve_counts, take_texts
from sret_scale.config.removed_fields import is_removed
from sret_scale.config.step_depth import DepthConfig
from sret_scale.config.telemetry_config import TelemetryConfig
from sret_scale.config.timm_config import TimmConfig, timm_config
from sret_scale.distill import DistillConfig
from sret_scale.memory import MemoryConfig
from sret_scale.model import SReTConfig, TextConfig, TranslationConfig, preset
from sret_scale.model.config import ImageConfig
from sret_scale.model.text.text_config import NUM_BYTES

ModelConfig = SReTConfig | TextConfig | TranslationConfig | TimmConfig
"""The kinds of models that a run may train, told apart by `kind`; the first is meant where that is absent."""

ParameterClass = Literal["tied", "projection", "residual", "stem_head"]
"""Parameters whose gradients differ in size, and grow differently with depth: blocks that are applied many times; the
projections and conditioning of single loops; residual coefficients; everything outside the stages."""


@dataclass(frozen=True, kw_only=True)
class ClassConfig:
    """How one class of parameters departs from the rest; what is None is as for all."""

    rate_ratio: float = 1.0
    """Its rate relative to the run's."""
    eps: float | None = None
    """In the place of optim.eps."""
    weight_decay: float | None = None
    """For those of its parameters that decay at all."""
    clip_norm: float | None = None
    """Clips the class by its own norm, and leaves it out of the norm that gradient_clipping of the ds_config bounds."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """An update rule, a cosine schedule after a linear warm-up; rates are per optimizer step, horizons in images.

    reference_batch_size: the batch that learning_rate is for.
    warmup_images: the rate rises from 0 to its peak over so many.
    weight_decay: decoupled, of matrices; vectors and coefficients have none.
    beta1, beta2, eps: of Adam and LAMB.
    """

    optimizer: Literal["adamw", "lamb", "muon"] = "adamw"
    """`muon` is an experiment: the matrices of the tied blocks by Muon, the rest by AdamW."""
    learning_rate: float = 1e-3
    """Peak rate at `reference_batch_size`."""
    reference_batch_size: int = 512
    batch_scaling: Literal["none", "linear", "sqrt", "linear_then_sqrt"] = "linear_then_sqrt"
    """How the peak rate follows global_batch_size / reference_batch_size (linear: SReT, DeiT). `linear_then_sqrt` goes
    on with the root beyond a batch of 2048."""
    layer_decay: float = 1.0
    """Factor of the rate per layer from the head to the stem; a block is one layer, however often it is applied."""
    final_rate_ratio: float = 0.01
    """The cosine ends at this part of the peak rate."""
    warmup_images: int = 0
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    tied: ClassConfig = field(default_factory=ClassConfig)
    projection: ClassConfig = field(default_factory=ClassConfig)
    residual: ClassConfig = field(default_factory=ClassConfig)
    stem_head: ClassConfig = field(default_factory=ClassConfig)
    ema_horizon_images: int = 0
    """Images over which the average of the weights forgets to 1/e; 0 keeps no average. Until so many were seen, the
    average is a plain mean, which forgets the initial weights."""
    ema_statistics_images: int = 1024
    """Training images over which BatchNorm's statistics are measured for the average before it is evaluated; 0 takes
    their average."""

    def __post_init__(self) -> None:
        bounds = {
            "above 0": "learning_rate reference_batch_size eps",
            "0 or more": "final_rate_ratio warmup_images weight_decay ema_horizon_images ema_statistics_images",
            "0 or more and less than 1": "beta1 beta2",
            "above 0 and at most 1": "layer_decay",
        }
        check_fields(self, "optim", bounds)
        for group in typing.get_args(ParameterClass):
            bounds = {"0 or more": "rate_ratio weight_decay", "above 0": "eps clip_norm"}
            check_fields(getattr(self, group), f"optim.{group}", bounds)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed computes."""

    ds_config: str = "zero0"
    """A file of ds_configs/ by its name, or a path to a JSON of the same kind."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Duration, batch and bookkeeping of a run; the clock counts images.

    seed: of weights, order, views and all other random numbers.
    total_images: the length of the run.
    global_batch_size: images of one optimizer step, over all ranks.
    keep_checkpoints: the newest so many stay.
    log_interval_steps: steps from one line of metrics.jsonl to the next.
    image_std: per channel, of pixels in [0, 1].
    """

    seed: int = 0
    initial_weights: str | None = None
    """`run:FOLDER` (its moving average where it has one), or a file of weights, native or published; for fine-tuning,
    also at another image size. None draws them from the seed."""
    total_images: int = 100_000
    global_batch_size: int = 128
    micro_batch_size: int = 64
    """Images per rank in one forward pass; the rest of the global batch is accumulated."""
    compile: Literal["none", "blocks", "auto"] = "auto"
    """Whether blocks and projections run through torch.compile, once for all loops. `auto`: on GPUs; on CPUs where the
    products of the whole run are above 1.5e14 FLOPs, 50 times what a core does (50 GFLOP/s) in the minute that
    compiling takes; never with dropout or memory.is_checked. Equal to eager up to rounding (docs/numerics.md).
    Evaluation stays eager. Code is kept in TORCHINDUCTOR_CACHE_DIR, or in the user's cache folder."""
    eval_interval_images: int = 0
    """0 evaluates at the end only."""
    checkpoint_interval_images: int = 0
    """0 saves at the end and when the run is stopped only."""
    keep_checkpoints: int = 2
    log_interval_steps: int = 10
    max_skipped_steps: int = 10
    """So many updates in a row, left out for a loss or gradient that is not finite, end the run; fp16's search for its
    loss scale does not count."""
    hang_timeout_s: float = 1200.0
    """A rank that comes no further for so long ends the run; more than the longest evaluation, save or compilation."""
    profile_steps: int = 0
    """Steps, from the fourth on, of which torch's profiler writes a trace, `profile.json` in the run's folder."""
    trackers: tuple[str, ...] = ()
    """Who is given every record of metrics.jsonl too: tensorboard and wandb (their extras), or your module:function."""
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    """Per channel, of pixels in [0, 1]; the default is ImageNet's."""
    image_std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        positive = "total_images global_batch_size micro_batch_size keep_checkpoints log_interval_steps"
        bounds = {
            "above 0": f"{positive} hang_timeout_s max_skipped_steps",
            "0 or more": "seed eval_interval_images checkpoint_interval_images profile_steps",
        }
        check_fields(self, "train", bounds)
        require(min(self.image_std) > 0, "train.image_std", "above 0", self.image_std)


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """What `task: grid` asks of the tokens, and by what it tells their accuracy apart."""

    ask_within: float | None = None
    """A token enters the loss once its attribute `ask_by` is at most so many times the loops done so far; null: from
    the first loop on. Tokens that have none (65535) always count."""
    ask_by: str = "distance"
    """An attribute of tokens that the shards have beside their labels."""
    bins: str | None = None
    """The attribute by which accuracy is told apart, in powers of two."""

    def __post_init__(self) -> None:
        check_fields(self, "grid", {"above 0": "ask_within"})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that decides what a run computes.

    task: a class for every image, with `grid` a label for every token, with `language` the next byte of a text, or with
        `translation` the next token of a sentence that says the same as another.
    """

    task: Literal["classification", "grid", "language", "translation"] = "classification"
    model: ModelConfig = field(default_factory=lambda: preset("sret_t"))
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    @property
    def images(self) -> ImageConfig:
        """The model, for what is asked of images alone. ValueError where it reads something else."""
        if not isinstance(self.model, ImageConfig):
            raise ValueError(f"expected a model of images, got one of kind {self.model.kind!r}")
        return self.model

    @property
    def vision(self) -> SReTConfig:
        """The model, for what is asked of an SReT alone. ValueError where it is of another kind."""
        if not isinstance(self.model, SReTConfig):
            raise ValueError(f"expected a model of kind 'vision', got one of kind {self.model.kind!r}")
        return self.model


def grad_accum_steps(config: TrainConfig, world_size: int) -> int:
    """Micro-steps per optimizer step: global_batch_size / (micro_batch_size * world_size).

    Raises ValueError where that is not a whole number of at least 1.
    """
    per_forward = config.micro_batch_size * world_size
    steps, remainder = divmod(config.global_batch_size, per_forward)
    if remainder or not steps:
        raise ValueError(
            f"train.global_batch_size={config.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{config.micro_batch_size} x {world_size} ranks = {per_forward}: change train.micro_batch_size (a "
            "run that has begun keeps its global batch), or choose e.g. "
            f"train.global_batch_size={max(per_forward, round(config.global_batch_size / per_forward) * per_forward)}"
        )
    return steps


# PyYAML reads a hundred kilobytes a second; a configuration has six.
MAX_YAML_BYTES = 1 << 18
MAX_YAML_DEPTH = 32


class _StrictLoader(yaml.SafeLoader):
    """YAML without its traps: a key given twice is an error, 1e-3 is a number; no aliases (bombs), tags, deep nests.

    `~/` is the home.
    """

    def __init__(self, text: str, source: str) -> None:
        super().__init__(text)
        self._source, self._depth = source, 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        for what in ("anchor", "tag"):
            if getattr(event, what, None) is not None:
                place = f"{self._source} is not valid YAML in line {event.start_mark.line + 1}"
                raise ValueError(f"{place}: aliases (&, *) and tags (!) are not taken; write the value itself")
        if self._depth >= MAX_YAML_DEPTH:
            raise ValueError(f"{self._source} is nested too deeply to be a configuration")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            place = f"{self._source} line {key_node.start_mark.line + 1}"
            if not isinstance(key, str):
                raise ValueError(f"{place}: a key must be text, got {key!r}")
            if key in seen:
                raise ValueError(f"{place}: the key {key!r} is given twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        return with_home(value) if isinstance(value, str) else value


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, *, source: str) -> Any:
    """The value of a YAML text (strict, see _StrictLoader); ValueError with `source` and the place for a bad one."""
    try:
        return _StrictLoader(text, source).get_single_data()
    except yaml.MarkedYAMLError as error:
        place = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{source} is not valid YAML{place}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        # Of a number or a date that Python does not take; ours name the source.
        raise (
            error if str(error).startswith(source) else ValueError(f"{source}: {str(error).partition('; use sys.')[0]}")
        ) from error


def read_yaml(file: Path) -> Any:
    """The value of a YAML file. Raises ValueError, with the file and the place, or OSError."""
    try:
        text = read_bounded(file, MAX_YAML_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: expected a YAML file ({error.reason})") from error
    return parse_yaml(text, source=str(file))


def nearest(name: str, valid: Sequence[str]) -> str:
    """A hint for an error message: the closest valid name, or all of them."""
    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid names: {', '.join(valid)}"


def build(kind: Any, value: Any, path: str = "") -> Any:
    """An instance of the dataclass (or plain type) `kind` from parsed YAML; `path` is the key for messages.

    Raises ValueError naming the key, the expected type and the value, or the nearest valid key. Numbers are finite and
    within 64 bits: what is beyond ends in an overflow, or a loop of years.
    """
    if isinstance(value, int | float) and not abs(value) < 2**63:
        raise ValueError(f"{path}: expected a finite number within 64 bits, got {str(value)[:40]}")
    section = _dataclass_of(kind, value)
    if section is not None:
        return _build_dataclass(section, value, path)
    item: Any = _tuple_item(kind)
    if item is not None and dataclasses.is_dataclass(item) and isinstance(value, list):
        return tuple(build(cast(Any, item), entry, f"{path}.{index}") for index, entry in enumerate(value))
    try:
        # JSON's strict mode takes a list for a tuple and a whole number for a float, and nothing else for another.
        return pydantic.TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError as error:
        # 1e6 is how people write a million images.
        if kind is int and isinstance(value, float) and value.is_integer():
            return int(value)
        first = error.errors()[0]
        # Of a tuple that is too short, pydantic says which place lacks its value.
        is_short = first["type"] == "missing"
        reason = "expected more values" if is_short else first["msg"].replace("Input should be", "expected")
        # pydantic speaks of JSON.
        reason = reason.replace("a valid array", "a list").replace("an object", "keys with values")
        place, found = (path, value) if is_short else (".".join([path, *map(str, first["loc"])]), first["input"])
        raise ValueError(f"{place}: {reason}, got {str(ascii(found))[:60]} ({type(found).__name__})") from error
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error


def _dataclass_of(kind: Any, value: Any) -> Any:
    """The dataclass that `value` should become, looking into unions; None where `kind` is no dataclass.

    Dataclasses of one union are told apart by their field `kind`; the first is meant where the value has none.
    """
    options: list[Any] = kinds_of(kind)
    if not options or (value is None and options != [kind]):
        return None
    if len(options) == 1 or not isinstance(value, Mapping) or "kind" not in value:
        return options[0]
    kinds = {option.kind: option for option in options}
    if not isinstance(value["kind"], str) or value["kind"] not in kinds:
        raise ValueError(f"kind: expected one of {', '.join(kinds)}, got {str(ascii(value['kind']))[:60]}")
    return kinds[value["kind"]]


def _tuple_item(kind: Any) -> Any:
    """X of `tuple[X, ...]`, else None."""
    arguments = typing.get_args(kind)
    return arguments[0] if typing.get_origin(kind) is tuple and arguments[-1] is Ellipsis else None


def _build_dataclass(kind: type[Any], value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path or 'the configuration'}: expected a section of `key: value`, got {value!r}")
    hints = typing.get_type_hints(kind)
    names = [entry.name for entry in dataclasses.fields(kind) if entry.init]
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in names and not is_removed(f"{prefix}{key}", value[key]):
            raise ValueError(f"unknown key {prefix + str(key)!r}: {_hint(prefix + str(key), value[key], names, kind)}")
    missing = [
        entry.name
        for entry in dataclasses.fields(kind)
        if entry.init
        and entry.name not in value
        and entry.default is dataclasses.MISSING
        and entry.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{prefix}{missing[0]} is not given and has no default")
    arguments = {key: build(hints[key], entry, f"{prefix}{key}") for key, entry in value.items() if key in names}
    try:
        return kind(**arguments)
    except ValueError as error:
        # A section that names its own field says it all; others say only what is wrong with it.
        raise ValueError(str(error) if not path or str(error).startswith(f"{path}.") else f"{path}: {error}") from error


def to_plain(config: Any) -> Any:
    """Dataclasses and tuples as dicts and lists: what `build` takes and YAML can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def model_of(name: str) -> ModelConfig:
    """The preset of that name, or the backbone that `timm:NAME?key=value` makes recursive; ValueError for neither."""
    return timm_config(name) if name.startswith("timm:") else preset(name)


class RefusedError(ValueError):
    """A configuration that cannot be. `text` is its YAML as far as it was read: what was refused is mended there."""

    def __init__(self, message: str, tree: Any) -> None:
        super().__init__(message)
        self.text = yaml.safe_dump(tree, sort_keys=False, width=120)


def to_yaml(config: Any) -> str:
    """The configuration as YAML that `from_yaml` reads back to an equal one."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, width=120)


def from_yaml(file: Path, assignments: Sequence[str] = ()) -> RunConfig:
    """The RunConfig of a YAML file, which may leave out what keeps its default, and give `model` by preset name.

    `assignments` as in `override`; counts of images may be texts, which are resolved after them.
    """
    tree = read_yaml(file)
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: expected sections of a run configuration, got {type(tree).__name__}")
    try:
        if isinstance(tree.get("model"), str):
            tree["model"] = to_plain(model_of(tree["model"]))
        texts = take_texts(tree)
        config: RunConfig = build(RunConfig, tree)
    except ValueError as error:
        raise RefusedError(f"{file}: {error}", tree) from error
    return override(config, [*texts, *assignments]) if texts or assignments else config


def override(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """`config` with `section.field=value` assignments applied in order; values are YAML.

    `model=NAME` takes another preset, or `timm:NAME?num_blocks=4&num_loops=3`, whole; items of a tuple are numbered
    (`model.stages.1.num_loops=20`), and a field of stages without a number is set in all (`model.num_loops=20`). Counts
    of images may be `10ep` or `5%` (`image_counts`), model.num_classes `auto`, for which the training set is opened,
    and data.tokens `auto`: those in the folder of the training set, or bytes for a model of 256 tokens without.
    """
    tree = to_plain(config)
    try:
        return _overridden(tree, assignments)
    except ValueError as error:
        raise RefusedError(str(error), tree) from error


def _overridden(tree: dict[str, Any], assignments: Sequence[str]) -> RunConfig:
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise ValueError(f"override {assignment!r} is not of the form section.field=value")
        value = parse_yaml(text, source=f"the value of {key}")
        if key == "model" and isinstance(value, str):
            tree["model"] = to_plain(model_of(value))
        elif not is_removed(key, value):
            _assign(tree, key, value)
    training_set = functools.cache(lambda: open_training_data(build(DataConfig, tree["data"], "data")))
    resolve_counts(tree, lambda: training_set().num_samples)
    if isinstance(tree["model"], dict) and tree["model"].get("num_classes") == "auto":
        tree["model"]["num_classes"] = training_set().num_classes
    if (data := tree["data"]) and isinstance(data, dict) and data.get("tokens") == "auto":
        own = Path(str(data["train_folder"])) / TOKENS_NAME
        # Where there are none, and the model is not of bytes, it is the file that is missed.
        is_of_bytes = isinstance(tree["model"], dict) and tree["model"].get("vocabulary") == NUM_BYTES
        data["tokens"] = None if is_of_bytes and not own.exists() else str(own)
    changed: RunConfig = build(RunConfig, tree)
    return changed


def _hint(key: str, value: Any, valid: Sequence[str], kind: type[Any] = RunConfig) -> str:
    """What was meant by a key that is not there; among all fields of a run, where the place is in its configuration."""
    sections = [entry.name for entry in dataclasses.fields(RunConfig)]
    if kind is not RunConfig and key.partition(".")[0] not in sections:
        return nearest(key.rpartition(".")[2], valid)
    return suggestion(key, value, [entry.name for entry in fields_of(RunConfig)], valid)


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    section, _, name = key.partition(".")
    if section == "model" and name not in tree["model"] and name in tree["model"]["stages"][0]:
        for stage in tree["model"]["stages"]:
            stage[name] = value
        return
    *parents, leaf = key.split(".")
    node: Any = tree
    walked: list[str] = []
    for part in [*parents, leaf]:
        valid = list(node) if isinstance(node, dict) else [str(index) for index in range(len(node))]
        if part not in valid:
            raise ValueError(f"unknown key {key!r}: {_hint(key, value, valid)}")
        walked.append(part)
        place: Any = part if isinstance(node, dict) else int(part)
        if len(walked) == len(parents) + 1:
            node[place] = value
        elif isinstance(node[place], dict | list):
            node = node[place]
        else:
            raise ValueError(f"{key!r}: {'.'.join(walked)} is a single value, it has no field {leaf!r}")


def whole_paths(config: RunConfig) -> RunConfig:
    """`config` with paths to its shards, their cache and its ds_config that mean the same in any working folder."""

    def whole(location: str) -> str:
        return location if ":" in location.partition("/")[0] else os.path.abspath(location)  # noqa: PTH100 (keeps links)

    data, ds_config = config.data, config.engine.ds_config
    data = dataclasses.replace(
        data,
        train_folder=whole(data.train_folder),
        test_folder=whole(data.test_folder),
        mixture_folders=tuple(map(whole, data.mixture_folders)),
        cache_folder=data.cache_folder and whole(data.cache_folder),
        tokens=data.tokens and whole(data.tokens),
    )
    engine = EngineConfig(ds_config=whole(ds_config) if ds_config.endswith(".json") else ds_config)
    return dataclasses.replace(config, data=data, engine=engine)


# Fields that an interrupted run may take up again with another value: they decide how, not what is computed.
# `train.micro_batch_size` is what another number of ranks needs; it changes BatchNorm's batches, and so the bits.
CHANGEABLE = (
    *("train.micro_batch_size", "train.compile", "train.eval_interval_images", "train.checkpoint_interval_images"),
    *("train.keep_checkpoints", "train.log_interval_steps", "train.hang_timeout_s", "train.trackers"),
    "train.max_skipped_steps",
    # Where data is; that they are the same is known by class names, the SHA-256 of tokens, and the fingerprint in the
    # data position.
    *("data.train_folder", "data.test_folder", "data.mixture_folders", "data.tokens"),
    *("data.workers", "data.worker_kind", "data.prefetch_batches", "data.cache_folder", "data.cache_gib"),
    *("data.fetch_threads", "data.fetch_ahead_steps", "data.stall_s", "data.fetch_attempts", "data.quarantine_file"),
    "data.max_bad_rate",
    *("memory", "engine.ds_config", "distill.teacher_micro_batch_size", "telemetry"),
)


# So may these until it is finished: the schedule is a function of images, and the new one holds from there on.
SCHEDULE = ("train.total_images", "optim.warmup_images")


def split_differences(old: RunConfig, new: RunConfig, *, is_finished: bool = False) -> tuple[list[str], list[str]]:
    """(differences that make another run, differences that a continued run may have), each `key: old -> new`."""
    changed, names = differences(old, new), CHANGEABLE if is_finished else CHANGEABLE + SCHEDULE
    allowed = [line for line in changed if any(re.match(rf"{re.escape(name)}[.:]", line) for name in names)]
    return [line for line in changed if line not in allowed], allowed


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """`key: old -> new` for every field that differs."""
    return differences_of(to_plain(old), to_plain(new))


def differences_of(old: Any, new: Any, path: str = "") -> list[str]:
    """`key: old -> new` for every leaf of two plain trees that differs."""
    if isinstance(old, dict) and isinstance(new, dict) and set(old) == set(new):
        return [line for key in old for line in differences_of(old[key], new[key], f"{path}.{key}".lstrip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for index, (a, b) in pairs for line in differences_of(a, b, f"{path}.{index}".lstrip("."))]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
