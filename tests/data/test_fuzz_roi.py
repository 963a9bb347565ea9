"""libFuzzer with the sanitizers of addresses and undefined behaviour on the C of views, libjpeg-turbo as the oracle."""

import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.image.native.library import SOURCES
from tests.data.stream_shards import encoded, smooth_image

FUZZ = Path(__file__).parents[1] / "fuzz" / "roi_fuzz.c"
SECONDS = 60


def _fuzzer(folder: Path, *flags: str, sources: tuple[Path, ...] = SOURCES) -> Path:
    """The fuzz target; skips where it cannot be built."""
    if shutil.which("clang") is None:
        pytest.skip("no clang: apt-get install clang libclang-rt-14-dev")
    target = folder / "fuzz"
    sanitizers = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined"]
    command = ["clang", "-g", "-O1", *sanitizers, *flags, f"-I{SOURCES[0].parent}", str(FUZZ), *map(str, sources)]
    result = subprocess.run([*command, "-ljpeg", "-lm", "-o", str(target)], capture_output=True, text=True, check=False)
    if "libclang_rt" in result.stderr or "jpeglib.h" in result.stderr:
        pytest.skip(f"no runtime of the sanitizers, or no headers of libjpeg-turbo: {result.stderr[-200:]}")
    assert result.returncode == 0, result.stderr
    return target


def _run(target: Path, folder: Path, seconds: int) -> "subprocess.CompletedProcess[str]":
    """Fuzzes from JPEGs of all kinds, each behind the bytes that choose its view."""
    corpus = folder / "corpus"
    corpus.mkdir()
    generator = np.random.default_rng(0)
    kinds: tuple[dict[str, Any], ...] = (
        {"subsampling": 0},
        {"subsampling": 1},
        {"progressive": True},
        {"optimize": True},
    )
    for number, (side, quality, options) in enumerate(itertools.product((17, 40), (30, 90, 100), kinds)):
        image = encoded(smooth_image(side, side + 9, number), "JPEG", quality=quality, **options)
        (corpus / str(number)).write_bytes(generator.bytes(12) + image)
    limits = [f"-max_total_time={seconds}", "-max_len=6000", "-timeout=20", "-rss_limit_mb=2000"]
    return subprocess.run(
        [target, corpus, *limits], capture_output=True, text=True, check=False, cwd=folder, timeout=10 * seconds + 100
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("flags", [(), ("-DROI_PLAIN",)])
def test_a_minute_of_fuzzing_finds_nothing(flags: tuple[str, ...], tmp_path: Path) -> None:
    result = _run(_fuzzer(tmp_path, *flags), tmp_path, SECONDS)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_fuzzer_finds_a_margin_that_is_missing(tmp_path: Path) -> None:
    """Chroma at the edges of a box is interpolated from pixels beside it: without them, pixels differ."""
    source = next(path for path in SOURCES if path.name == "roi_decode.c")
    text = source.read_text()
    broken = tmp_path / source.name
    broken.write_text(text.replace("margin_x = decoder->max_h_samp_factor * DCTSIZE", "margin_x = 0"))
    assert broken.read_text() != text
    target = _fuzzer(tmp_path, sources=(broken, *(path for path in SOURCES if path != source)))
    result = _run(target, tmp_path, 30)
    assert result.returncode != 0 and "other pixels" in result.stderr
