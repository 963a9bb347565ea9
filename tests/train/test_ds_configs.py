"""The files of ds_configs/: they load, DeepSpeed accepts them, and mistakes in a user's own file are named."""

import json
from pathlib import Path
from typing import Any

import pytest

from sret_scale.config.ds_config import ALLOWED_KEYS, REFUSED_KEYS, bundled_ds_configs, load_ds_config


def write(folder: Path, config: object) -> Path:
    path = folder / "own.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def test_bundled_files_are_the_documented_ones() -> None:
    expected = (
        "zero0",
        "zero0_autocast",
        "zero1",
        "zero1_autocast",
        "zero1_autocast_fp16",
        "zero2",
        "zero2_offload",
        "zero3",
        "zero3_offload",
    )
    assert bundled_ds_configs() == expected


@pytest.mark.parametrize("name", bundled_ds_configs())
def test_bundled_file_passes_our_checks_and_deepspeeds(name: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig  # seconds to import, and only this test needs it

    config = load_ds_config(name)
    assert config["zero_optimization"]["stage"] == int(name[4])
    engine = DeepSpeedConfig({**config, "train_micro_batch_size_per_gpu": 1})
    assert engine.zero_optimization_stage == int(name[4])
    assert engine.gradient_clipping == config["gradient_clipping"]
    assert not engine.bfloat16_config.enabled and not engine.float16_config.enabled
    assert engine.torch_autocast_enabled == ("autocast" in name)
    assert (engine.zero_config.offload_optimizer is not None) == ("offload" in name)


def test_every_allowed_key_is_one_that_deepspeed_reads() -> None:
    import deepspeed.runtime.config as deepspeed_config

    source_folder = Path(deepspeed_config.__file__).parents[1]
    source = "".join(path.read_text() for path in source_folder.rglob("*.py"))
    assert {key for key in ALLOWED_KEYS if f'"{key}"' not in source and f"'{key}'" not in source} == set()


@pytest.mark.parametrize("key", sorted(REFUSED_KEYS))
def test_batch_rate_duration_and_bf16_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}' is not set here"):
        load_ds_config(write(tmp_path, {"gradient_clipping": 1.0, key: 1}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gradient_cliping": 1.0}, "unknown key 'gradient_cliping'; did you mean 'gradient_clipping'"),
        ({"gradient_clipping": 1.0, "amp": {}}, "unknown key 'amp'"),
        ({}, "state gradient_clipping"),
        ({"gradient_clipping": True}, "state gradient_clipping"),
        ({"gradient_clipping": 1.0, "torch_autocast": {"enabled": True}}, "lower_precision_safe_modules"),
        ({"gradient_clipping": 1.0, "communication_data_type": "bf16"}, "communication_data_type is 'fp32'.*16 bits"),
        ({"gradient_clipping": 1.0, "communication_data_type": None}, "communication_data_type is 'fp32'.*got None"),
        ({"gradient_clipping": 1.0, "data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype is 'fp32'.*'bf16'"),
        ({"gradient_clipping": 1.0, "data_types": {"param_dtype": "fp16"}}, "data_types.param_dtype is 'fp32'"),
        ({"gradient_clipping": 1.0, "data_types": {"buffer_dtype": ["fp32"]}}, "data_types.buffer_dtype is 'fp32'"),
        ({"gradient_clipping": 1.0, "data_types": {"grad_acum_dtype": "fp32"}}, "data_types takes an object of"),
        ({"gradient_clipping": 1.0, "data_types": "fp32"}, "data_types takes an object of"),
        ('{"gradient_clipping": 1, "gradient_clipping": 2}', "appears twice"),
        ('{"gradient_clipping": NaN}', "NaN is not a JSON number"),
        ("[1]", "expected an object"),
        ("{", "own.json"),
    ],
)
def test_mistake_is_named(tmp_path: Path, config: dict[str, Any] | str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        load_ds_config(write(tmp_path, config))


def test_a_file_saved_on_windows_is_read(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_bytes(b'\xef\xbb\xbf{"gradient_clipping": 1.0}\r\n')
    assert load_ds_config(tmp_path / "own.json") == {"gradient_clipping": 1.0}


def test_missing_file_names_the_nearest_bundled_one() -> None:
    with pytest.raises(FileNotFoundError, match="did you mean zero1_autocast"):
        load_ds_config("zero1_autocats")


def test_gradient_clipping_zero_is_allowed(tmp_path: Path) -> None:
    assert load_ds_config(write(tmp_path, {"gradient_clipping": 0}))["gradient_clipping"] == 0


def test_stated_fp32_is_accepted_by_us_and_by_deepspeed(tmp_path: Path) -> None:
    import torch
    from deepspeed.runtime.config import DeepSpeedConfig

    own = {
        "gradient_clipping": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32", "param_dtype": "fp32", "buffer_dtype": "fp32"},
    }
    config = load_ds_config(write(tmp_path, own))
    engine = DeepSpeedConfig({**config, "train_micro_batch_size_per_gpu": 1})
    assert engine.communication_data_type == torch.float32
    assert (engine.grad_accum_dtype, engine.param_dtype, engine.buffer_dtype) == ("fp32", "fp32", "fp32")
