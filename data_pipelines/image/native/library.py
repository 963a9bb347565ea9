"""Views of JPEGs, decoded and resized where they are needed, and normalisation: an optional small library.

Set-up builds it (`python -m data_pipelines.image.native.library`) where there are a C compiler and the headers of
libjpeg-turbo. It gives the bits that decoding the whole image and resizing with torch gives, so a run does not depend
on whether a machine has it; docs/data.md names the one exception, among damaged images, and what the library gains.
"""

import ctypes
import functools
import itertools
import logging
import os
import shlex
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

SOURCES = tuple(sorted(Path(__file__).parent.glob("roi_*.c")))


def _library_path() -> Path:
    """The library of these sources: one that was built from others has another name, and is not loaded.

    In a checkout it lies beside them, of an installed package in the user's cache: pip removes only what it put in.
    """
    files = [*SOURCES, *sorted(Path(__file__).parent.glob("roi_*.h"))]
    digest = zlib.crc32(b"".join(file.read_bytes() for file in files))
    name = f"_roi_decode.{digest:08x}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111 (homeless: no error)
    is_beside = (Path(__file__).parents[3] / "setup.cfg").exists() or not cache.is_absolute()
    return Path(__file__).with_name(name) if is_beside else cache / "sret_scale" / name


LIBRARY = _library_path()
_END_OF_IMAGE = b"\xff\xd9"


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The built library, or None where it has not been built."""
    if is_stale():
        logger.warning(
            "the compiled JPEG decoder is older than its sources and is not used: "
            "python -m data_pipelines.image.native.library"
        )
    return _load(LIBRARY) if LIBRARY.exists() else None


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.roi_view.argtypes = [ctypes.c_char_p, size, pointer, pointer]
    library.roi_normalise.argtypes = [pointer, size, size, pointer, pointer, number, pointer]
    library.roi_normalise.restype = None
    return library


def is_stale() -> bool:
    """Whether there is a library here, but only of other sources: after an update it must be built again."""
    return not LIBRARY.exists() and any(Path(__file__).parent.glob("_roi_decode.*.so"))


def is_in_use() -> bool:
    """Whether there is a library of these sources here."""
    return _library() is not None


def decode_view(
    data: bytes, view: tuple[int, int, int, int, int], interpolation: str, out_CHW: NDArray[np.uint8]
) -> bool:
    """Writes the RGB pixels of a view of a JPEG to `out_CHW`, or returns False when they have to be had in another way.

    That is so without the library, and for data that libjpeg-turbo complains about up to the box, or that lacks its
    end.
    """
    library = _library()
    if library is None or not data.endswith(_END_OF_IMAGE):
        return False
    return _view(library, data, view, interpolation, out_CHW)


def _view(
    library: ctypes.CDLL,
    data: bytes,
    view: tuple[int, int, int, int, int],
    interpolation: str,
    out_CHW: NDArray[np.uint8],
) -> bool:
    size = out_CHW.shape[1]
    assert out_CHW.shape == (3, size, size) and out_CHW.dtype == np.uint8 and out_CHW.flags.c_contiguous
    wanted = (ctypes.c_int * 7)(*view, size, interpolation == "bicubic")
    failed = library.roi_view(data, len(data), ctypes.addressof(wanted), out_CHW.ctypes.data)
    return not failed


def normalise(images_BCHW: "Tensor", mean: Sequence[float], std: Sequence[float], out_BCHW: "Tensor") -> bool:
    """Writes (pixel / 255 - mean) / std of uint8 pixels to floats; both contiguous. False without the library."""
    library = _library()
    if library is None:
        return False
    _normalise(library, images_BCHW, mean, std, out_BCHW)
    return True


def _normalise(
    library: ctypes.CDLL, images_BCHW: "Tensor", mean: Sequence[float], std: Sequence[float], out_BCHW: "Tensor"
) -> None:
    assert images_BCHW.is_contiguous() and out_BCHW.is_contiguous() and images_BCHW.shape == out_BCHW.shape
    num_channels = images_BCHW.shape[1]
    of_channels = [(ctypes.c_float * num_channels)(*values) for values in (mean, std)]
    library.roi_normalise(
        images_BCHW.data_ptr(),
        images_BCHW.shape[0] * num_channels,
        images_BCHW.shape[2] * images_BCHW.shape[3],
        *of_channels,
        num_channels,
        out_BCHW.data_ptr(),
    )


def build() -> None:
    """Compiles the library. Raises RuntimeError with what is missing, or when its pixels differ, and OSError."""
    compiler = os.environ.get("CC", "cc")
    # A process that has the old library loaded keeps it: the new one gets its name at once, by renaming.
    unfinished = LIBRARY.with_name(f"{LIBRARY.stem}.{os.getpid()}.so")
    # Multiplying and adding in one step would round weights otherwise than torch does.
    flags = ["-O3", "-Wall", "-ffp-contract=off", "-shared", "-fPIC"]
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    try:
        _run([*shlex.split(compiler), *flags, *map(str, SOURCES), "-o", str(unfinished), "-ljpeg", "-lm"])
        # Another process, because a library that does not fit its libjpeg may end it.
        _run([sys.executable, "-P", "-m", "data_pipelines.image.native.library", "check", str(unfinished)])
        for other in Path(__file__).parent.glob("_roi_decode*.so"):
            # Those of other sources; of these, another node may be building.
            if not other.name.startswith(LIBRARY.stem):
                other.unlink(missing_ok=True)
        unfinished.replace(LIBRARY)
    except FileNotFoundError as error:
        raise RuntimeError(f"no C compiler {compiler!r}; set CC") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1] if lines else "")
        raise RuntimeError(
            f"{reason or f'status {result.returncode}'} (Debian and Ubuntu: apt-get install libjpeg-dev)"
        )


def check(path: Path) -> None:
    """Raises ValueError unless the library at `path` gives what simplejpeg and torch give, bit for bit."""
    import simplejpeg
    import torch

    from data_pipelines.config import DataConfig, Interpolation
    from data_pipelines.image.view import box_pixels

    library = _load(path)
    noise_HWC = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    # Blocks of 10 pixels have both few and many coefficients.
    blocks_HWC = np.ascontiguousarray(noise_HWC[:9, :13].repeat(10, axis=0).repeat(10, axis=1))
    for pixels_HWC in (noise_HWC, blocks_HWC):
        for quality, subsampling in itertools.product((50, 90, 99, 100), ("444", "420")):
            data = bytes(simplejpeg.encode_jpeg(pixels_HWC, quality, "RGB", subsampling))
            whole_CHW = torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)
            for interpolation in get_args(Interpolation):
                got_CHW = np.empty((3, 32, 32), np.uint8)
                is_there = _view(library, data, (20, 30, 50, 70, 1), interpolation, got_CHW)
                config = DataConfig(interpolation=interpolation)
                expected_CHW = box_pixels(whole_CHW[:, 20:70, 30:100], 1, config, 32)
                if not is_there or not np.array_equal(got_CHW, expected_CHW.numpy()):
                    raise ValueError("error: its pixels are not those of simplejpeg and torch")
    bytes_1CHW = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    floats_1CHW = torch.empty(bytes_1CHW.shape)
    _normalise(library, bytes_1CHW, (0.485,), (0.229,), floats_1CHW)
    if not torch.equal(floats_1CHW, bytes_1CHW.float().div_(255).sub_(torch.tensor(0.485)).div_(torch.tensor(0.229))):
        raise ValueError("error: its floats are not those of torch")


def main(arguments: list[str]) -> int:
    """Builds, or checks a library that has been built."""
    if arguments[:1] == ["check"]:
        check(Path(arguments[1]))
        return 0
    if not build_or_say_why():
        return 1
    print(f"built {LIBRARY}")
    return 0


@functools.cache
def build_at_first_use() -> None:
    """Makes up for pip, which builds nothing; in a checkout set-up has built the library, or has said why it cannot."""
    if LIBRARY.parent != Path(__file__).parent and not LIBRARY.exists():
        build_or_say_why()


def build_or_say_why() -> bool:
    """Builds the library; one line on stderr where that fails."""
    try:
        build()
    except (RuntimeError, OSError) as error:
        print(f"not built, so whole images will be decoded: {error}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
