"""Named arrays as the bytes of an uncompressed .npz file, the same bytes for the same arrays; never a pickle."""

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Columns = Mapping[str, NDArray[Any]]

# Zip files cannot say "no time"; this is their earliest one.
_NO_TIME = (1980, 1, 1, 0, 0, 0)


def render_columns(columns: Columns) -> bytes:
    """The bytes of an .npz file that `numpy.load` opens."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in columns.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _NO_TIME), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def parse_columns(data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays, read-only. Raises ValueError when these are not the bytes of such a file."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            columns = {name: np.asarray(file[name]) for name in file.files}
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise ValueError(f"not an .npz file of plain arrays: {error}") from error
    for array in columns.values():
        array.flags.writeable = False
    return columns
