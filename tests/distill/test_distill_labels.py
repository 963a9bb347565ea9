"""A store of soft labels: the same bytes by any number of ranks and after kills; what is wrong is said early."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from data_pipelines.image.augment import AugmentConfig
from data_pipelines.labels.records import coverage_sums
from data_pipelines.labels.store import check_files, check_labels, open_labels
from data_pipelines.shards.index import ShardSet
from sret_scale.distill import DistillConfig, StoredTeacher, label_writer, open_matching_labels
from sret_scale.distill.label_teacher import changes_views
from sret_scale.distill.label_verify import plan_teacher, verify_records
from sret_scale.distill.label_writer import LabelJob, plan_labels, write_labels
from tests.data.stream_shards import TarShards
from tests.distill.distill_shards import DATA, NUM_CLASSES, NUM_SAMPLES, make_job, make_shards, teacher

ROOT = Path(__file__).parents[2]
PLAIN = AugmentConfig(randaugment_ops=0, erase_rate=0.0, mixup_alpha=0.0, cutmix_alpha=0.0)


def silent(text: str) -> None:
    pass


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, shards: ShardSet) -> LabelJob:
    job = make_job(tmp_path_factory.mktemp("labels") / "store", shards)
    assert write_labels(job, rank=0, world_size=1, report=silent)
    return job


@pytest.fixture
def store(written: LabelJob, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(written.folder, tmp_path / "store")


def test_store_has_a_file_per_shard_and_block_of_views(written: LabelJob) -> None:
    names = [
        f"shard-{shard:06d}.views-{views}.labels" for shard in range(3) for views in ("00000-00001", "00002-00002")
    ]
    assert sorted(contents(written.folder)) == sorted([*names, "plan.json", "header.json"])


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_bytes_are_the_same_for_every_number_of_ranks(
    written: LabelJob, shards: ShardSet, tmp_path: Path, world_size: int
) -> None:
    job = make_job(tmp_path / "store", shards)
    finished = [write_labels(job, rank=rank, world_size=world_size, report=silent) for rank in range(world_size)]
    assert finished[-1] and not all(finished[:1])
    assert contents(job.folder) == contents(written.folder)


def test_bytes_are_the_same_after_kills_and_another_number_of_ranks(
    written: LabelJob, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path / "store", shards)
    calls = iter(range(100))

    def killed(*args: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return write_unit(*args)

    write_unit = label_writer.write_unit
    monkeypatch.setattr(label_writer, "write_unit", killed)
    with pytest.raises(KeyboardInterrupt):
        write_labels(job, rank=0, world_size=2, report=silent)
    # What SIGKILL leaves in the middle of a file.
    (job.folder / "shard-000002.views-00000-00001.labels.host.123.tmp").write_bytes(b"half")
    assert not write_labels(job, rank=2, world_size=3, report=silent)
    assert write_labels(job, rank=0, world_size=1, report=silent)
    assert contents(job.folder) == contents(written.folder)


@pytest.mark.multi_process
def test_bytes_are_the_same_after_sigkill(written: LabelJob, shards: ShardSet, tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = [sys.executable, "-m", "tests.ranks.label_process", str(tmp_path / "shards"), str(store), "0", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(list(store.glob("*.labels"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill()
    assert len(list(store.glob("*.labels"))) >= 2
    assert not (store / "header.json").exists()
    assert write_labels(make_job(store, shards), rank=0, world_size=1, report=silent)
    assert contents(store) == contents(written.folder)


def test_a_finished_store_is_not_written_again(store: Path, shards: ShardSet) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in store.glob("*.labels")}
    said: list[str] = []
    assert write_labels(make_job(store, shards), rank=0, world_size=1, report=said.append)
    assert said == [f"{store}: 0 of 6 files to write"]
    assert before == {path.name: path.stat().st_mtime_ns for path in store.glob("*.labels")}


def test_coverage_is_that_of_all_views(written: LabelJob) -> None:
    coverage = open_labels(written.folder).coverage
    assert coverage["views"] == 3 * NUM_SAMPLES and coverage["mass"] == pytest.approx(1)
    assert 0 <= coverage["kl"] < 1e-5 and 0 < coverage["entropy"] < np.log(NUM_CLASSES)


def test_store_begun_before_a_figure_was_measured_is_finished_without_it(
    written: LabelJob, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path / "store", shards)

    def early(*arguments: Any) -> dict[str, float]:
        return {name: value for name, value in coverage_sums(*arguments).items() if name != "gradient_cosine"}

    with monkeypatch.context() as patch:
        patch.setattr(label_writer, "coverage_sums", early)
        assert not write_labels(job, rank=0, world_size=2, report=silent)
    assert write_labels(job, rank=1, world_size=2, report=silent)
    whole = open_labels(written.folder).coverage
    assert open_labels(job.folder).coverage == {name: whole[name] for name in whole if name != "gradient_cosine"}


def test_fewer_classes_keep_less_mass_and_their_kl_is_reported(shards: ShardSet, tmp_path: Path) -> None:
    coverages = []
    for top_k in (1, 3):
        job = make_job(tmp_path / str(top_k), shards, top_k=top_k)
        write_labels(job, rank=0, world_size=1, report=silent)
        coverages.append(open_labels(job.folder).coverage)
    assert coverages[0]["mass"] < coverages[1]["mass"] < 1
    assert coverages[0]["kl"] > coverages[1]["kl"] > 1e-4
    assert coverages[0]["entropy"] == coverages[1]["entropy"]


def test_reading_gives_the_answers_about_each_sample_and_view(written: LabelJob) -> None:
    store = open_labels(written.folder)
    indices = np.array([21, 0, 8, 9, 21, 13])
    views = np.array([0, 2, 1, 2, 2, 0])
    together = store.read(indices, views)
    fresh = open_labels(written.folder)
    for row, (index, view) in enumerate(zip(indices, views, strict=True)):
        assert together[row] == fresh.read(np.array([index]), np.array([view]))[0]
    assert len(np.unique(together["box"], axis=0)) == 6


def open_for_training(folder: Path, shards: ShardSet, *, data: Any = DATA, augment: Any = PLAIN, **config: Any) -> Any:
    store = open_matching_labels(folder, DistillConfig(**config), shards=shards, data=data, augment=augment, run_seed=0)
    check_files(folder, store.plan)
    return StoredTeacher(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_views": 4}, r"has 3 views of each image, the run asks for 4; set data\.num_views=3"),
        ({"num_views": None}, r"asks for new ones in every epoch; set data\.num_views=3"),
        ({"view_seed": 6}, r"other views than this run draws; they need data\.view_seed=5"),
        ({"view_seed": None}, r"they need data\.view_seed=5"),
        ({"crop_scale": (0.3, 1.0)}, r"they need data\.crop_scale=\[0\.2, 1\.0\]"),
        ({"crop": "padded"}, r"they need data\.crop=resized"),
        ({"flip_rate": 0.0}, r"they need data\.flip_rate=0\.5"),
    ],
)
def test_run_with_other_views_is_refused(store: Path, shards: ShardSet, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_for_training(store, shards, data=replace(DATA, **change))


def test_fewer_views_than_there_are_is_fine(store: Path, shards: ShardSet) -> None:
    opened = open_for_training(store, shards, data=replace(DATA, num_views=2))
    assert opened.store.plan.num_views == 3


def test_labels_of_other_shards_or_classes_are_refused(store: Path, tmp_path: Path) -> None:
    other = make_shards(tmp_path / "other", seed=100)
    with pytest.raises(ValueError, match="labels of other shards"):
        open_for_training(store, other)
    other.num_classes = 9
    with pytest.raises(ValueError, match="labels of 7 classes, the data has 9"):
        check_labels(open_labels(store), other, DATA, 0)


def test_teacher_on_mixed_images_is_refused_and_mixed_labels_are_not(store: Path, shards: ShardSet) -> None:
    mixing = replace(PLAIN, mixup_alpha=0.8)
    with pytest.raises(ValueError, match=r"set distill\.teacher_input=view"):
        open_for_training(store, shards, augment=mixing)
    assert open_for_training(store, shards, augment=mixing, teacher_input="view").store.folder == store


@pytest.mark.parametrize(
    "name", ["randaugment_ops", "three_augment_rate", "color_jitter", "erase_rate", "cutmix_alpha"]
)
def test_every_augmentation_counts_as_another_image(name: str) -> None:
    assert not changes_views(PLAIN)
    assert changes_views(replace(PLAIN, **{name: 1}))  # type: ignore[arg-type]


def test_every_flipped_bit_and_every_cut_is_noticed_before_training(store: Path, shards: ShardSet) -> None:
    generator = np.random.default_rng(0)
    files = sorted(store.glob("*.labels"))
    assert len(files) >= 2
    for path in files:
        data = path.read_bytes()
        for _ in range(8):
            bit = int(generator.integers(8 * len(data)))
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            for damaged in (bytes(flipped), data[: bit // 8]):
                path.write_bytes(damaged)
                with pytest.raises(ValueError, match=rf"{path.name}: .*remove .*labels write"):
                    open_for_training(store, shards)
        path.write_bytes(data)
    open_for_training(store, shards)


def test_each_rank_checks_its_part_of_the_files(store: Path) -> None:
    plan = open_labels(store).plan
    bad = plan.file_name(list(plan.units())[3])
    data = bytearray((store / bad).read_bytes())
    data[-1] ^= 1
    (store / bad).write_bytes(bytes(data))
    check_files(store, plan, rank=0, world_size=2)
    with pytest.raises(ValueError, match="were changed"):
        check_files(store, plan, rank=1, world_size=2)


def test_missing_unfinished_and_mixed_stores_are_told_apart(store: Path, shards: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no store of soft labels; make one with .*labels write"):
        open_labels(tmp_path / "nowhere")
    other = make_job(tmp_path / "other", shards, function="other_network")
    write_labels(other, rank=0, world_size=1, report=silent)
    name = "shard-000001.views-00000-00001.labels"
    shutil.copy(other.folder / name, store / name)
    with pytest.raises(ValueError, match="belongs to another store"):
        open_for_training(store, shards)
    (store / name).unlink()
    with pytest.raises(FileNotFoundError, match="unfinished, 1 files are missing; run the same"):
        open_labels(store)


@pytest.mark.parametrize("name", ["plan.json", "header.json"])
def test_damaged_description_is_an_error_of_one_line(store: Path, name: str) -> None:
    text = (store / name).read_text()
    for damaged in ("", text[:50], "[]", text.replace("1", "2", 1)):
        (store / name).write_text(damaged)
        with pytest.raises(ValueError, match=r"^[^\n]*$"):
            check_files(store, open_labels(store).plan)


def test_folder_of_another_plan_is_refused_with_what_differs(store: Path, shards: ShardSet) -> None:
    with pytest.raises(ValueError, match=r"other settings \(top_k 7, now 3\)"):
        write_labels(make_job(store, shards, top_k=3), rank=0, world_size=1, report=silent)
    with pytest.raises(ValueError, match=r"other settings \(teacher.spec "):
        write_labels(make_job(store, shards, function="other_network"), rank=0, world_size=1, report=silent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 8}, "expected top_k from 1 to 7, got 8"),
        ({"num_views": 0}, "expected views from 1 to"),
        ({"views_per_file": 9}, "expected views_per_file from 1 to 3, got 9"),
    ],
)
def test_impossible_numbers_are_refused(shards: ShardSet, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_job(tmp_path, shards, **change)


def test_nan_of_a_teacher_names_the_sample(shards: ShardSet, tmp_path: Path) -> None:
    job = make_job(tmp_path / "store", shards)

    def sometimes_nan(unit_BCHW: torch.Tensor) -> torch.Tensor:
        logits_BC = teacher()(unit_BCHW)
        logits_BC[-1, 3] = float("nan")
        return logits_BC

    with pytest.raises(ValueError, match="NaN or infinite logits for sample '00000003', view 0"):
        write_labels(replace(job, teacher=cast(Any, sometimes_nan)), rank=0, world_size=1, report=silent)


def test_broken_image_stops_the_writer_and_is_named(tmp_path: Path) -> None:
    broken = TarShards(tmp_path / "shards", [b"\xff\xd8\xff no image"] * 4, [0, 1, 2, 6])
    with pytest.raises(ValueError, match=r"soft labels need every image: .*sample '0000000\d'"):
        write_labels(make_job(tmp_path / "store", broken), rank=0, world_size=1, report=silent)


def test_plan_is_readable_by_people_and_complete(written: LabelJob, shards: ShardSet) -> None:
    plan = json.loads((written.folder / "plan.json").read_text())
    assert plan["teacher"]["weights_sha256"] == teacher().describe()["weights_sha256"]
    assert plan["view"]["seed"] == 5 and plan["view"]["crop_scale"] == [0.2, 1.0]
    assert plan["shards"] == [["shard-000000.tar", 9], ["shard-000001.tar", 9], ["shard-000002.tar", 4]]
    numbers = {"top_k": 7, "num_views": 3, "views_per_file": 2, "batch_size": 4, "image_size": 16}
    assert plan_labels(shards, teacher(), data=DATA, **numbers) == written.plan


def test_verify_finds_the_teacher_that_wrote_and_no_other(written: LabelJob, shards: ShardSet, tmp_path: Path) -> None:
    store = open_labels(written.folder)
    same = plan_teacher(store.plan, TEACHER, written.device, no_runs)
    result = verify_records(store, shards, same, num_records=40, seed=3)
    assert result.num_records == 40 and result.largest_difference < 1e-3
    other = verify_records(store, shards, teacher("other_network"), num_records=40, seed=3)
    assert other.largest_difference > 0.01
    with pytest.raises(ValueError, match="has changed since the labels were written: weights_sha256 differ"):
        plan_teacher(store.plan, "module:tests.distill.distill_shards:other_network", written.device, no_runs)


def test_joined_teachers_are_stored_and_verified(shards: ShardSet, tmp_path: Path) -> None:
    job = make_job(tmp_path / "store", shards, function="network+module:tests.distill.distill_shards:other_network")
    write_labels(job, rank=0, world_size=1, report=silent)
    store = open_labels(job.folder)
    both = plan_teacher(store.plan, f"{TEACHER}+module:tests.distill.distill_shards:other_network", job.device, no_runs)
    assert verify_records(store, shards, both, num_records=10, seed=0).largest_difference < 1e-3


TEACHER = "module:tests.distill.distill_shards:network"


def no_runs(folder: Path) -> Any:
    raise AssertionError(folder)
