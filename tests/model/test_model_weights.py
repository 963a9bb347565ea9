"""Weights on disk: the published layout in and out, and what is refused."""

import argparse
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from sret_scale.cli import main
from sret_scale.config.recipes import recipe
from sret_scale.config.timm_config import timm_config
from sret_scale.model import SReT, StackConfig, preset
from sret_scale.model.vision.official import from_published, published_names, to_published
from sret_scale.model.vision.sret import as_sret
from sret_scale.model.vision.weight_files import load_model, load_published, save_model


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the published layout, of a model with 7 classes."""
    torch.manual_seed(0)
    model = SReT(preset("sret_t", num_classes=7))
    path = tmp_path_factory.mktemp("weights") / "published.pth"
    torch.save({"model": to_published(model.config, model.state_dict())}, path)
    return path


def test_import_and_export_are_an_exact_round_trip(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native, back = tmp_path / "native.safetensors", tmp_path / "back.pth"
    assert main(["weights", "import", str(published), str(native)]) == 0
    assert "sret_t at 224 pixels, 7 classes" in capsys.readouterr().out
    assert main(["weights", "export", str(native), str(back)]) == 0
    first, second = load_published(published)[0], load_published(back)[0]
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert as_sret(load_model(native), "this").config.num_classes == 7


def test_the_published_order_and_number_of_keys_are_kept() -> None:
    names = published_names(preset("sret_t"))
    assert len(names) > len(set(names.values()))
    assert next(iter(names)) == "pos_embed" and list(names)[-1] == "head.bias"


def refused(capsys: pytest.CaptureFixture[str], file: Path, out: Path) -> str:
    assert main(["weights", "import", str(file), str(out)]) == 2
    assert not out.exists()
    return capsys.readouterr().err


def test_a_pickle_that_would_run_code_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (eval, (f"open({str(marker)!r}, 'w')",))

    file = tmp_path / "hostile.pth"
    torch.save({"model": Hostile()}, file)
    assert "nothing in it was run" in refused(capsys, file, tmp_path / "out")
    file.write_bytes(pickle.dumps(Hostile(), protocol=2))
    assert "nothing in it was run" in refused(capsys, file, tmp_path / "out")
    assert not marker.exists()


def beside(state: object, key: str) -> dict[str, object]:
    """A checkpoint of a training code, with the kinds of things that such codes keep beside the weights."""
    arguments = argparse.Namespace(lr=1e-3, output_dir=Path("out"))
    optimizer = {"state": {}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    return {key: state, "args": arguments, "optimizer": optimizer, "epoch": 1, "best": np.float64(70.0)}


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("key", "prefix", "what"),
    [
        ("state_dict", "module.", "FKD: a DataParallel model"),
        ("model", "", "DeiT"),
        ("model", "module.", "DistributedDataParallel"),
        ("model", "_orig_mod.", "torch.compile"),
        ("model", "module._orig_mod.", "both"),
        ("model_ema", "", "DeiT's average"),
        ("state_dict_ema", "", "timm's average"),
    ],
)
def test_checkpoints_of_training_codes_are_imported(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, prefix: str, what: str
) -> None:
    state, _ = load_published(published)
    content = beside({prefix + name: value for name, value in state.items()}, key)
    if key.endswith("_ema"):
        # The weights that the average is of: taking them instead would show.
        content |= {name: {one: value * 0 for one, value in state.items()} for name in ("model", "state_dict")}
    torch.save(content, tmp_path / "theirs.pth")
    expected, native = from_published(preset("sret_t", num_classes=7), state), tmp_path / "native.safetensors"
    assert main(["weights", "import", str(tmp_path / "theirs.pth"), str(native)]) == 0
    assert f"from {key!r}" in capsys.readouterr().out
    imported = load_model(native).state_dict()
    assert all(torch.equal(imported[name], value) for name, value in expected.items()), what


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("name", ["PosixPath", "WindowsPath"])
def test_paths_that_any_python_wrote_are_passed_over(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    """Python 3.13 pickles paths as of `pathlib._local`, the others as of `pathlib`, and Windows has its own."""
    theirs = type(name, (), {"__module__": module, "__reduce__": lambda path: (type(path), ("out",))})
    fake = ModuleType(module)
    setattr(fake, name, theirs)
    state, _ = load_published(published)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, fake)
        torch.save({"model": state, "args": argparse.Namespace(output_dir=theirs())}, tmp_path / "theirs.pth")
    assert load_published(tmp_path / "theirs.pth")[0].keys() == state.keys()


def test_what_stands_beside_the_weights_runs_nothing(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (eval, (f"open({str(marker)!r}, 'w')",))

    content = beside(load_published(published)[0], "model")
    torch.save(content | {"args": argparse.Namespace(lr=Hostile())}, tmp_path / "hostile.pth")
    assert "nothing in it was run" in refused(capsys, tmp_path / "hostile.pth", tmp_path / "out")
    assert not marker.exists()


def test_a_truncated_or_missing_file_is_an_error(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = published.read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 10):
        (tmp_path / "cut.pth").write_bytes(content[:length])
        assert "error: " in refused(capsys, tmp_path / "cut.pth", tmp_path / "out")
    assert "no file" in refused(capsys, tmp_path / "absent.pth", tmp_path / "out")


def test_aliases_that_differ_are_refused(published: Path) -> None:
    state, _ = load_published(published)
    key = "transformers.1.blocks.2.attn.qkv.weight"
    state[key] = state[key] + 1
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv.weight and .*blocks.2.attn.qkv.weight are one shared"):
        from_published(preset("sret_t", num_classes=7), state)


def test_a_key_too_many_or_too_few_is_refused(published: Path) -> None:
    state, _ = load_published(published)
    config = preset("sret_t", num_classes=7)
    with pytest.raises(ValueError, match="1 unknown"):
        from_published(config, state | {"surprise": torch.zeros(1)})
    state.pop("norm.bias")
    with pytest.raises(ValueError, match="1 missing"):
        from_published(config, state)


@pytest.mark.lengthy
def test_other_weights_fit_no_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = preset("sret_t", num_classes=3)
    torch.save({"model": {"fc.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    assert "no published SReT state dict" in refused(capsys, tmp_path / "other.pth", tmp_path / "out")
    wider = replace(config, stages=(replace(config.stages[0], mlp_ratio=2.0), *config.stages[1:]))
    torch.save(to_published(wider, SReT(wider).state_dict()), tmp_path / "wider.pth")
    assert "fit no preset" in refused(capsys, tmp_path / "wider.pth", tmp_path / "out")


def test_the_published_layout_refuses_what_it_cannot_hold() -> None:
    config = preset("sret_t_108")
    with pytest.raises(ValueError, match=r"branch_scheme 'published' only, stage 0 has 'loop_aware'"):
        to_published(config, {})


def test_native_files_keep_any_config(tmp_path: Path) -> None:
    config = preset("demo_student_108")
    config = replace(config, stages=tuple(replace(stage, conditioning="norm_per_loop") for stage in config.stages))
    model = SReT(config).eval()
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.config == config
    images_BCHW = torch.randn(1, 3, 28, 28)
    assert torch.equal(loaded(images_BCHW), model(images_BCHW))
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_model(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    "config",
    [
        preset("demo_control_20", conditioning="norm_by_depth"),
        preset("reach", num_loops=4),
        recipe("lm_tiny").config.model,
        recipe("nmt_tiny").config.model,
        timm_config(
            "timm:SwinTransformer?image_size=32&num_classes=4&patch_size=2&embed_dim=8&depths=[2,2]&num_heads=[2,4]"
            "&window_size=4&drop_path_rate=0.0&unit=2"
        ),
    ],
    ids=["by depth", "windows without positions", "language", "translation", "timm"],
)
def test_native_files_are_of_every_kind(config: StackConfig, tmp_path: Path) -> None:
    """What follows from a config, and is in no file, is there too; and the global generator is left alone."""
    model, example = config.build().eval(), config.example(2)
    save_model(model, tmp_path / "model.safetensors")
    state = torch.get_rng_state()
    loaded = load_model(tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), state) and loaded.config == config
    example = example if example.dtype == torch.int64 else torch.randn_like(example)
    assert torch.equal(loaded(example), model(example))
