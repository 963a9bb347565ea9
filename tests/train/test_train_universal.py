"""Universal checkpoints: DeepSpeed's engine loads ours, we import what it wrote, and hostile ones run nothing."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sret_scale.cli import main
from sret_scale.config.run_config import RunConfig, to_plain
from sret_scale.model import SReT
from sret_scale.runs.checkpoint import list_checkpoints, read_state, read_tensors, save_checkpoint
from sret_scale.train.distributed import saved_buffers
from tests.ranks.universal_ranks import STAGES
from tests.runs import run_two_ranks
from tests.tiny import TINY_MODEL, tiny_config, tiny_shards, write_config

STEP, BATCH = 2, 32


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(tiny_shards(tmp_path_factory.mktemp("shards")))


def random_sets(*, with_ema: bool) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(3)
    model = SReT(TINY_MODEL)
    weights = {name: torch.randn(value.shape) for name, value in model.named_parameters()}
    buffers = {
        name: torch.rand(value.shape) if value.is_floating_point() else torch.full_like(value, 5)
        for name, value in saved_buffers(model).items()
    }
    moments = {
        f"{kind}.{name}": torch.rand(value.shape)
        for name, value in weights.items()
        for kind in ("exp_avg", "exp_avg_sq")
    }
    sets = {"weights": weights | buffers, "optimizer": {"step": torch.tensor(float(STEP)), **moments}}
    if not with_ema:
        return sets
    statistics = {name: value + 2 for name, value in buffers.items() if value.is_floating_point()}
    return sets | {"ema": {name: value + 1 for name, value in sets["weights"].items()}, "ema_statistics": statistics}


def make_run(folder: Path, config: RunConfig, *, has_checkpoint: bool = True) -> Path:
    write_config(folder / "config.yaml", config)
    state = {
        "images": STEP * BATCH,
        "time_s": 1.5,
        "loader": json.dumps({"epoch": 0, "position": STEP * BATCH}),
        "ema_updates": STEP,
        "missed_updates": {"head.weight": 1},
        "is_evaluated": True,
        "model": to_plain(TINY_MODEL),
        "teacher": None,
    }
    if has_checkpoint:
        save_checkpoint(folder / "checkpoints", step=STEP, tensors=random_sets(with_ema=True), state=state)
    return folder


def newest(run: Path) -> Path:
    return list_checkpoints(run / "checkpoints")[0]


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def test_out_and_in_again_is_the_same_checkpoint(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_run(tmp_path / "source", config)
    target = make_run(tmp_path / "target", config, has_checkpoint=False)
    assert main(["checkpoint", "convert", str(source), "--to", str(tmp_path / "universal")]) == 0
    assert main(["checkpoint", "convert", str(target), "--from", str(tmp_path / "universal")]) == 0
    for what in ("weights", "optimizer", "ema", "ema_statistics"):
        assert_equal(read_tensors(newest(target), what), read_tensors(newest(source), what))
    assert read_state(newest(target)) == read_state(newest(source))
    assert "parameters that missed updates: 1 (most of all head.weight: 1); DeepSpeed counts" in capsys.readouterr().out


@pytest.fixture(scope="module")
def from_deepspeed(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks of DeepSpeed's engine wrote, and what they loaded from our export."""
    folder = tmp_path_factory.mktemp("deepspeed")
    run = make_run(folder / "run", config)
    assert main(["checkpoint", "convert", str(run), "--to", str(folder / "export")]) == 0
    run_two_ranks("tests.ranks.universal_ranks", folder, folder / "export")
    return folder


@pytest.mark.multi_process
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_loads_our_export_bit_for_bit(from_deepspeed: Path, stage: str) -> None:
    expected, buffers = random_sets(with_ema=False), saved_buffers(SReT(TINY_MODEL))
    weights = load_file(from_deepspeed / f"{stage}.loaded.weights.safetensors")
    trained = {name: value for name, value in expected["weights"].items() if name not in buffers}
    # DeepSpeed leaves buffers alone when it loads this layout.
    assert_equal({name: value for name, value in weights.items() if name not in buffers}, trained)
    assert_equal(load_file(from_deepspeed / f"{stage}.loaded.optimizer.safetensors"), expected["optimizer"])


@pytest.mark.multi_process
@pytest.mark.parametrize("stage", STAGES)
def test_we_import_what_deepspeed_wrote_bit_for_bit(
    from_deepspeed: Path, config: RunConfig, stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two micro-steps of four images on two ranks are a global batch of 16.
    config = replace(config, train=replace(config.train, global_batch_size=16, micro_batch_size=4))
    run = make_run(tmp_path / "run", config, has_checkpoint=False)
    assert main(["checkpoint", "convert", str(run), "--from", str(from_deepspeed / stage / "universal")]) == 0
    assert "trained by DeepSpeed up to step 2: " in capsys.readouterr().out
    for what in ("weights", "optimizer"):
        trained = load_file(from_deepspeed / f"{stage}.trained.{what}.safetensors")
        assert_equal(read_tensors(newest(run), what), trained)
    state = read_state(newest(run))
    assert (state["step"], state["images"], json.loads(state["loader"])["position"]) == (2, 32, 32)
    assert_equal(read_tensors(newest(run), "ema"), read_tensors(newest(run), "weights"))


class Hostile:
    """Unpickled, it would leave a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.proof,)  # type: ignore[return-value]


@pytest.mark.parametrize("place", ["mp_rank_00_model_states.pt", "zero/{name}/fp32.pt", "zero/{name}/step.pt"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_hostile_pickle_is_an_error_and_runs_nothing(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, writer: str
) -> None:
    run = make_run(tmp_path / "run", config)
    assert main(["checkpoint", "convert", str(run), "--to", str(tmp_path / "universal")]) == 0
    name = next(name for name, _ in SReT(TINY_MODEL).named_parameters())
    file = tmp_path / "universal" / newest(run).name / place.format(name=name)
    assert file.exists()
    proof = tmp_path / "proof"
    if writer == "torch":
        torch.save(Hostile(proof), file)
    else:
        file.write_bytes(pickle.dumps(Hostile(proof), protocol=2))
    assert main(["checkpoint", "convert", str(run), "--from", str(tmp_path / "universal")]) == 2
    error = capsys.readouterr().err
    assert str(file) in error and "holds more than tensors and numbers" in error and not proof.exists()
    # The payload is live: only the restricted loader stood in its way.
    with file.open("rb") as stream:
        torch.load(stream, weights_only=False) if writer == "torch" else pickle.load(stream)  # noqa: S301
    assert proof.exists()


def test_what_does_not_fit_is_named(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", config)
    universal = tmp_path / "universal"

    def refusal(*arguments: object) -> str:
        assert main(["checkpoint", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "takes one of --to" in refusal("convert", run)
    assert "belong to `checkpoint convert`" in refusal("info", run, "--to", universal)
    assert "has no folder zero/" in refusal("convert", run, "--from", tmp_path)
    assert main(["checkpoint", "convert", str(run), "--to", str(universal)]) == 0
    assert "is there already" in refusal("convert", run, "--to", universal)
    other = make_run(
        tmp_path / "other", replace(config, model=replace(TINY_MODEL, num_classes=11)), has_checkpoint=False
    )
    assert "expected a tensor of shape (11" in refusal("convert", other, "--from", universal)
    later = make_run(tmp_path / "later", config)
    newest(later).rename(later / "checkpoints" / "step-000000009")
    assert "checkpoints of later steps than the imported 2" in refusal("convert", later, "--from", universal)
