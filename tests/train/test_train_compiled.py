"""`train.compile`: which runs are compiled, the same training on ranks, one line at the start, exact restarts."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sret_scale.config.recipes import recipe
from sret_scale.config.run_config import RunConfig
from sret_scale.config.telemetry_config import TelemetryConfig
from sret_scale.memory import MemoryConfig
from sret_scale.model import SReT
from sret_scale.runs.checkpoint import list_checkpoints
from sret_scale.train.engine import compilation
from sret_scale.train.engine.compilation import check_compile, use_cache, wants_compiled
from tests.ranks.compiled_ranks import STAGE
from tests.ranks.engine_ranks import DS_CONFIGS
from tests.runs import complete_lines, digest, run_two_ranks
from tests.tiny import ROOT, TINY_MODEL, sret_scale, tiny_config, tiny_shards, write_config
from tests.train.golden_runs import config_of


def with_compile(config: RunConfig, choice: Any) -> RunConfig:
    return replace(config, train=replace(config.train, compile=choice))


def test_auto_compiles_long_runs_and_those_on_gpus() -> None:
    published, short = recipe("sret").config, config_of("plain", Path("shards"))
    assert published.train.compile == short.train.compile == "auto"
    assert wants_compiled(published, "cpu") and not wants_compiled(short, "cpu")
    assert wants_compiled(published, "cuda") and wants_compiled(short, "cuda")
    hour = replace(published, train=replace(published.train, total_images=23_000))
    assert wants_compiled(hour, "cpu")
    assert not wants_compiled(replace(hour, train=replace(hour.train, total_images=22_000)), "cpu")
    assert not wants_compiled(with_compile(published, "none"), "cuda")
    assert wants_compiled(with_compile(short, "blocks"), "cpu")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"model": replace(recipe("sret").config.model, dropout=0.1)}, "model.dropout"),
        ({"memory": MemoryConfig(is_checked=True)}, "memory.is_checked"),
    ],
)
def test_what_blocks_cannot_have_is_refused_or_left_eager(change: dict[str, Any], name: str) -> None:
    config = replace(recipe("sret").config, **change)
    assert not wants_compiled(config, "cuda")
    check_compile(config)
    with pytest.raises(ValueError, match=rf"train\.compile=blocks does not work with {name}.*change one of the two"):
        check_compile(with_compile(config, "blocks"))


def test_code_is_kept_where_nobody_else_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # setenv first, so that what the function sets is undone.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere")
    assert use_cache() == Path("/somewhere")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = use_cache()
    assert found == tmp_path / "cache" / "sret_scale" / "compiled" and found.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/1/nowhere")
    alone = use_cache()
    assert alone.stat().st_mode & 0o777 == 0o700 and not any(alone.iterdir())
    # What lies where others may write is nobody's to run.
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found.chmod(0o777)
    assert use_cache() not in (found, alone)


def test_news_are_what_was_compiled_since(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = compilation.Compiled(tmp_path)
    torch._dynamo.utils.counters.clear()
    assert compiled.news() is None
    torch._dynamo.utils.counters["stats"]["unique_graphs"] = 8
    assert re.fullmatch(
        rf"compiled 8 graphs of blocks in [\d.]+ s; their code is kept in {tmp_path}", compiled.news() or ""
    )
    assert compiled.news() is None
    torch._dynamo.utils.counters.clear()


@pytest.mark.multi_process
def test_ranks_train_compiled_blocks_as_eager_ones(tmp_path: Path) -> None:
    """At every ZeRO stage and under bf16, recomputed; later steps compile nothing."""
    run_two_ranks("tests.ranks.compiled_ranks", tmp_path)
    torch.manual_seed(0)
    start = SReT(replace(TINY_MODEL, stages=(STAGE,))).state_dict()
    for name in DS_CONFIGS:
        eager, compiled = (load_file(tmp_path / f"{name}.{label}.safetensors") for label in ("eager", "compiled"))
        first, last = compiled.pop("graphs").tolist()
        # A block and a projection, each with and without a tape.
        assert first == last == 4, name
        del eager["graphs"]
        assert compiled.keys() == eager.keys()
        if name == "zero1_autocast":
            # As in tests/train/test_train_matrix.py: the share of the way that the weights went.
            apart, way = (
                torch.cat([(other[key] - eager[key]).flatten() for key in eager]).norm() for other in (compiled, start)
            )
            assert apart < 0.05 * way
            continue
        far = [key for key in eager if not torch.allclose(eager[key], compiled[key], rtol=1e-3, atol=2e-4)]
        assert far == [], name


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_run_continues_to_the_bit_and_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    config = with_compile(tiny_config(tiny_shards(tmp_path / "shards")), "blocks")
    # Two graphs, which take a quiet core half a minute.
    config = replace(config, model=replace(config.model, stages=(STAGE,)), memory=MemoryConfig())
    settings = {"total_images": 160, "checkpoint_interval_images": 32, "keep_checkpoints": 100}
    file = write_config(tmp_path / "run.yaml", config, **settings)

    def start(run: str) -> tuple[str, float, str]:
        """Graphs, seconds and folder, as the run prints them."""
        process = sret_scale("train", file, "--run", tmp_path / run, cwd=ROOT)
        out, error = process.communicate(timeout=1200)
        assert process.returncode == 0, (out, error)
        line = r"compiled (\d+) graphs of blocks in ([\d.]+) s; their code is kept in (\S+)"
        ((graphs, seconds, folder),) = re.findall(line, out)
        return graphs, float(seconds), folder

    first = start("straight")
    assert first[2] == str(tmp_path / "code") and any((tmp_path / "code").iterdir())
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    for newest in list_checkpoints(tmp_path / "stopped" / "checkpoints")[:2]:
        shutil.rmtree(newest)
    (tmp_path / "stopped" / "status.json").unlink()
    second = start("stopped")
    assert digest(tmp_path / "stopped") == digest(tmp_path / "straight")
    assert second[0] == first[0] and second[1] < 0.5 * first[1]


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_student_learns_and_is_looked_at_as_an_eager_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    eager = replace(
        config_of("distilled", tiny_shards(tmp_path / "shards")), telemetry=TelemetryConfig(interval_steps=5)
    )
    lines = {}
    for choice in ("none", "blocks"):
        file = write_config(tmp_path / f"{choice}.yaml", with_compile(eager, choice))
        process = sret_scale("train", file, "--run", tmp_path / choice, cwd=ROOT)
        assert process.communicate(timeout=1200) and process.returncode == 0
        lines[choice] = complete_lines(tmp_path / choice / "metrics.jsonl")
    losses, looks = (
        {choice: [line for line in found if line["kind"] == kind] for choice, found in lines.items()}
        for kind in ("train", "telemetry")
    )
    assert len(losses["none"]) == 20 and len(looks["none"]) == 4
    for one, other in zip(losses["none"], losses["blocks"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
    for one, other in zip(looks["none"], looks["blocks"], strict=True):
        assert one.keys() == other.keys()
