"""Bad images under each policy, full disks, killed writers, several writers at once."""

import contextlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.shards.index import WORK_FOLDER, open_shards
from data_pipelines.shards.manifest import read_manifest
from data_pipelines.stream.processes import run_jobs
from data_pipelines.upkeep.verify import verify_shards
from data_pipelines.writing.prepare import ImageOptions
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.cli import main
from tests.data.shard_sources import IMAGENET_LIKE, encoded, jpeg, make_tree, pixels
from tests.data.test_shards_write import assert_same_files


def animated() -> bytes:
    return encoded(pixels(1), "GIF", save_all=True, append_images=[pixels(2)])


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header says that it is so large."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(100)))
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg_of(width: int, height: int) -> bytes:
    """A JPEG whose frame header (SOF0: length, precision, height, width) says that it is so large."""
    data = bytearray(jpeg(1))
    frame = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, frame + 5, height, width)
    return bytes(data)


BAD = {
    "empty.JPEG": (b"", "empty file"),
    "text.JPEG": (b"hello world, I am no image", "not an image"),
    "ole.JPEG": (b"\xd0\xcf\x11\xe0" + bytes(100), "not an image"),
    "headless.JPEG": (jpeg(1)[:10], "not an image|not a readable image"),
    "enormous.png": (png_of(30_000, 30_000), "too large"),
    "vast.JPEG": (jpeg_of(30_000, 30_000), "too large: 30000 x 30000"),
    "flat.png": (png_of(0, 20), "size 0 x 20|not an image|not a readable image"),
    "thin.JPEG": (jpeg_of(24, 0), "size 24 x 0|not an image|not a readable image"),
    "animated.gif": (animated(), "animated: 2 frames"),
    "\u56fe" * 60: (b"a name of 540 letters as a key", "not an image"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_stops_the_run_by_default(tmp_path: Path, name: str) -> None:
    tree = make_tree(tmp_path / "tree", 2)
    content, reason = BAD[name]
    (tree / IMAGENET_LIKE[1] / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}': ({reason}).*--on-bad skip"):
        write_shards(WriteConfig(kind="folder", source=tree), tmp_path / "target")


@pytest.mark.parametrize("policy", ["skip", "quarantine"])
def test_bad_images_are_left_out_and_counted(tmp_path: Path, policy: str) -> None:
    tree = make_tree(tmp_path / "tree", 4)
    for name, (content, _) in BAD.items():
        (tree / IMAGENET_LIKE[1] / name).write_bytes(content)
    target = tmp_path / "target"
    options = ImageOptions(on_bad=policy)  # type: ignore[arg-type]
    config = WriteConfig(kind="folder", source=tree, shard_samples=5, options=options)
    manifest = write_shards(config, target, max_bad_rate=0.5)
    assert (manifest.num_samples, manifest.num_rejected) == (12, len(BAD))
    assert verify_shards(target) == []
    rejected = [json.loads(line) for line in (target / "rejected.jsonl").read_text().splitlines()]
    assert {Path(item["name"]).name for item in rejected} == set(BAD)
    assert all(item["reason"] for item in rejected)
    kept = target / "quarantine"
    assert kept.exists() == (policy == "quarantine")
    if policy == "quarantine":
        assert sorted(path.read_bytes() for path in kept.iterdir()) == sorted(content for content, _ in BAD.values())


def test_a_refused_write_goes_on_under_the_policy_that_its_message_advises(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 4)
    (tree / IMAGENET_LIKE[1] / "empty.JPEG").write_bytes(b"")
    target = tmp_path / "target"
    with pytest.raises(ValueError, match="--on-bad skip or --on-bad quarantine"):
        write_shards(WriteConfig(kind="folder", source=tree, shard_samples=5), target, max_bad_rate=0.1)
    options = ImageOptions(on_bad="skip")
    config = WriteConfig(kind="folder", source=tree, shard_samples=5, options=options)
    assert write_shards(config, target, max_bad_rate=0.1).num_samples == 12
    assert write_shards(config, tmp_path / "at once", max_bad_rate=0.1) == read_manifest(target)
    assert_same_files(target, tmp_path / "at once")


def test_too_many_bad_images_stop_the_run(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 4)
    (tree / IMAGENET_LIKE[1] / "empty.JPEG").write_bytes(b"")
    config = WriteConfig(kind="folder", source=tree, options=ImageOptions(on_bad="skip"))
    with pytest.raises(ValueError, match=r"1 of 13 samples are bad, more than the share of 0\.01"):
        write_shards(config, tmp_path / "target")
    assert write_shards(config, tmp_path / "target", max_bad_rate=0.1).num_samples == 12


def test_a_broken_body_is_found_by_decoding_only(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 4)
    whole = encoded(pixels(3, 200, 200))
    (tree / IMAGENET_LIKE[1] / "cut.JPEG").write_bytes(whole[: len(whole) // 2])
    write_shards(WriteConfig(kind="folder", source=tree), tmp_path / "header")
    [finding] = verify_shards(tmp_path / "header")
    assert finding.key == f"{IMAGENET_LIKE[1]}/cut" and "does not decode" in finding.reason
    strict = WriteConfig(kind="folder", source=tree, options=ImageOptions(check="decode"))
    with pytest.raises(ValueError, match=r"cut\.JPEG"):
        write_shards(strict, tmp_path / "decode")


def test_cmyk_jpeg_and_a_png_named_jpeg_are_good_images(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 1)
    cmyk, png = encoded(pixels(1).convert("CMYK")), encoded(pixels(2), "PNG")
    (tree / IMAGENET_LIKE[0] / "cmyk.JPEG").write_bytes(cmyk)
    (tree / IMAGENET_LIKE[0] / "png.JPEG").write_bytes(png)
    write_shards(WriteConfig(kind="folder", source=tree, options=ImageOptions(check="decode")), tmp_path / "target")
    assert verify_shards(tmp_path / "target") == []
    data = (tmp_path / "target" / "shard-000000.tar").read_bytes()
    assert cmyk in data and png in data
    assert b"n01440764/png.png\0" in data and b"n01440764/cmyk.jpg\0" in data


def test_resize_reduces_and_says_so(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 2)
    (tree / IMAGENET_LIKE[0] / "large.JPEG").write_bytes(jpeg(1, 90, 60))
    (tree / IMAGENET_LIKE[0] / "tall.png").write_bytes(encoded(pixels(2, 40, 80).convert("RGBA"), "PNG"))
    options = ImageOptions(resize=30, quality=90)
    manifest = write_shards(WriteConfig(kind="folder", source=tree, options=options, seed=None), tmp_path / "target")
    assert manifest.writer["options"]["resize"] == 30 and manifest.writer["options"]["quality"] == 90
    shards = open_shards(tmp_path / "target")
    assert verify_shards(tmp_path / "target") == []
    sizes = {key: (int(shards.width[i]), int(shards.height[i])) for i, key in enumerate(shards.keys)}
    assert sizes["n01440764/large"] == (45, 30) and sizes["n01440764/tall"] == (30, 60)
    assert sizes["n01440764/n01440764_0"] == (24, 20)
    data = (tmp_path / "target" / "shard-000000.tar").read_bytes()
    index = list(shards.keys).index("n01440764/large")
    small = data[int(shards.offset[index]) :][: int(shards.length[index])]
    (tmp_path / "small.jpg").write_bytes(small)
    with Image.open(tmp_path / "small.jpg") as image:
        expected = np.asarray(pixels(1, 90, 60).resize((45, 30), Image.Resampling.BICUBIC), np.float32)
        assert np.abs(np.asarray(image, np.float32) - expected).mean() < 6


def test_a_full_disk_says_so_and_the_run_continues_later(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 4)
    config = WriteConfig(kind="folder", source=tree, shard_samples=4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, hard))
    try:
        # A limit on the size of files acts as a disk that is full after the plan.
        with pytest.raises(
            OSError, match=r"File too large; make room and run the same command again.*shard-000000\.tar"
        ):
            write_shards(config, tmp_path / "target")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.glob("target/*.tar")) and not list(tmp_path.glob(f"target/{WORK_FOLDER}/*.tmp"))
    write_shards(config, tmp_path / "target")
    write_shards(config, tmp_path / "whole")
    assert_same_files(tmp_path / "target", tmp_path / "whole")


def test_a_half_finished_target_refuses_other_arguments(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 2)
    bad = tree / IMAGENET_LIKE[2] / "zzz.JPEG"
    bad.write_bytes(b"")
    with pytest.raises(ValueError, match="empty file"):
        write_shards(WriteConfig(kind="folder", source=tree), tmp_path / "target")
    with pytest.raises(ValueError, match=r"half-finished shard set made with another seed, shard_samples; .*delete"):
        write_shards(WriteConfig(kind="folder", source=tree, seed=3, shard_samples=2), tmp_path / "target")


def test_a_source_that_changes_after_the_plan_is_noticed(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 2)
    path = tree / IMAGENET_LIKE[2] / f"{IMAGENET_LIKE[2]}_1.JPEG"
    bad = tree / IMAGENET_LIKE[0] / "aaa.JPEG"
    bad.write_bytes(b"")
    config = WriteConfig(kind="folder", source=tree, seed=None)
    with pytest.raises(ValueError, match="empty file"):
        write_shards(config, tmp_path / "target")
    bad.write_bytes(b"now there is something")
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(ValueError, match="the source has changed since the plan"):
        write_shards(config, tmp_path / "target")


def _command(tree: Path, target: Path, shard_samples: int = 10) -> list[str]:
    cut = ["--shard-samples", str(shard_samples)]
    arguments = ["shards", "write", "folder", str(tree), str(target), *cut, "--workers", "2"]
    return [sys.executable, "-m", "sret_scale.cli", *arguments]


@pytest.mark.multi_process
def test_killed_again_and_again_the_bytes_are_the_same(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 200)
    whole, target = tmp_path / "whole", tmp_path / "target"
    write_shards(WriteConfig(kind="folder", source=tree, shard_samples=3), whole)
    rng = np.random.default_rng(0)
    num_killed = 0
    for turn in range(3):
        command = _command(tree, target, shard_samples=3)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        start = time.monotonic()
        while not list(target.glob("*.tar")) and process.poll() is None and time.monotonic() < start + 60:
            time.sleep(0.005)
        time.sleep(float(rng.uniform(0, 0.05)))
        if turn % 2:
            process.kill()
            process.communicate()
        else:
            error = _kill_a_worker(process)
            assert (target / "manifest.json").exists() or "error: a worker process was killed" in error
        if (target / "manifest.json").exists():
            break
        num_killed += 1
        with pytest.raises(FileNotFoundError, match="unfinished"):
            open_shards(target)
    assert num_killed
    assert subprocess.run(_command(tree, target, shard_samples=3), capture_output=True).returncode == 0
    assert_same_files(target, whole)


def _kill_a_worker(process: "subprocess.Popen[str]") -> str:
    """What the command says of it."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children()
        # The first child only tracks what the others share.
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        if workers:
            workers[-1].kill()
    return process.communicate()[1]


@pytest.mark.multi_process
def test_workers_die_with_their_command(tmp_path: Path) -> None:
    import psutil

    tree = make_tree(tmp_path / "tree", 200)
    process = subprocess.Popen(
        _command(tree, tmp_path / "target"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    children: list[psutil.Process] = []
    start = time.monotonic()
    while len(children) < 3 and process.poll() is None and time.monotonic() < start + 60:
        children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


@pytest.mark.multi_process
def test_several_commands_share_one_target_as_nodes_do_and_go_on_without_one_that_is_killed(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 100)
    whole, target = tmp_path / "whole", tmp_path / "target"
    write_shards(WriteConfig(kind="folder", source=tree, shard_samples=2), whole)
    command = _command(tree, target, shard_samples=2)
    nodes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    started_s = time.monotonic()
    while not list(target.glob("*.tar")) and time.monotonic() < started_s + 60:
        time.sleep(0.005)
    nodes[0].kill()
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes[1:]] == [0, 0]
    assert all("300 samples" in output for output in outputs[1:])
    assert_same_files(target, whole)


def test_the_command_reports_bad_input_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = make_tree(tmp_path / "tree", 2)
    (tree / IMAGENET_LIKE[0] / "empty.JPEG").write_bytes(b"")
    target = str(tmp_path / "target")
    assert main(["shards", "write", "folder", str(tree), target]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 'n01440764/empty.JPEG': empty file") and error.count("\n") == 1
    assert main(["shards", "write", "folder", str(tree), target, "--workers", "0"]) == 2
    skip = ["--on-bad", "skip", "--max-bad-rate", "0.5"]
    assert main(["shards", "write", "folder", str(tree), str(tmp_path / "other"), *skip]) == 0
    assert "6 samples of 3 classes in 1 shard," in capsys.readouterr().out
    assert read_manifest(tmp_path / "other").num_rejected == 1


def test_a_target_that_may_not_be_written(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 1)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        write_shards(WriteConfig(kind="folder", source=tree), tmp_path / "file" / "target")


@pytest.mark.multi_process
def test_a_killed_worker_is_reported() -> None:
    with pytest.raises(OSError, match="a worker process was killed"):
        list(run_jobs(_Suicide, (), range(4), 2))


class _Suicide:
    """A worker that the kernel kills, as when memory runs out."""

    def __call__(self, number: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
