"""Names in files from elsewhere that are joined to a folder: none leads out of it. Shards: `test_shards_hostile.py`."""

import json
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, zeros

from data_pipelines.labels.store import LabelPlan, read_plan
from data_pipelines.writing.prepare import ImageOptions
from data_pipelines.writing.rows import Rejected
from data_pipelines.writing.shard_writer import QUARANTINE_FOLDER, _apply_policy
from sret_scale.lab.experiments.declared import _run_name
from sret_scale.runs.checkpoint import CheckpointError, save_checkpoint, verify_checkpoint

NAMES = ("..", ".", "", "../out", "/abs/out", "a/../../out", "a/b", "nul\0", "../../.ssh/authorized_keys")


@pytest.mark.parametrize("name", NAMES)
def test_a_store_of_labels_names_plain_files_only(tmp_path: Path, name: str) -> None:
    teacher = {"spec": "run:x", "weights_sha256": "0" * 64, "image_size": 32, "interpolation": "bicubic"}
    values = {
        **{"format": "sret_scale soft labels", "fingerprint": "0" * 64, "shards": [[name, 3]], "num_classes": 3},
        **{"top_k": 1, "num_views": 1, "views_per_file": 1, "batch_size": 1, "image_size": 32, "view": {}},
        "teacher": {**teacher, "mean": [0.5], "std": [0.5], "precision": "fp32"},
    }
    (tmp_path / "plan.json").write_text(json.dumps({**values, "shards": [["s.tar", 3]]}))
    assert isinstance(read_plan(tmp_path), LabelPlan)
    (tmp_path / "plan.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"plan\.json: .*expected a plain file name"):
        read_plan(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_names_plain_files_only(tmp_path: Path, name: str) -> None:
    tensors: dict[str, dict[str, Tensor]] = {"weights": {"a": zeros(2)}}
    path = save_checkpoint(tmp_path / "c", step=1, tensors=tensors, state={})
    verify_checkpoint(path)
    (tmp_path / "c" / "out").write_bytes(b"")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": "0" * 64}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="missing, or no plain name"):
        verify_checkpoint(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_sweeps_run_has_a_plain_name(name: str) -> None:
    made = _run_name({"name": name})
    assert made not in ("", ".", "..") and "/" not in made and "\0" not in made


@pytest.mark.parametrize("key", ["../out", "/abs/out", "a/../../out", "../../.ssh/authorized_keys", "x" * 5000])
def test_a_quarantined_image_stays_in_its_folder(tmp_path: Path, key: str) -> None:
    target = tmp_path / "set"
    target.mkdir()
    bad = Rejected(key=key, name=key, reason="broken")
    _apply_policy(bad, np.arange(3, dtype=np.uint8).tobytes(), ImageOptions(on_bad="quarantine"), target)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [file.parent for file in files] == [target / QUARANTINE_FOLDER]
