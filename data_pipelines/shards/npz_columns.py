"""Named arrays as the bytes of an uncompressed .npz file, the same bytes for the same arrays; never a pickle."""

import io
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Columns = Mapping[str, NDArray[Any]]

# Zip files cannot say "no time"; this is their earliest one.
_NO_TIME = (1980, 1, 1, 0, 0, 0)

# What numpy writes before an array of one dimension and a plain type, in version 1.0 of its format.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<|][iuf][1248])', 'fortran_order': False, 'shape': \((\d{1,18}),\), \} *\n",
    re.DOTALL,
)


def render_columns(columns: Columns) -> bytes:
    """The bytes of an .npz file that `numpy.load` opens."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in columns.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _NO_TIME), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def parse_columns(data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays, read-only. Raises ValueError when these are not the bytes of such a file.

    Only what `render_columns` writes is read: nothing is unpacked, and no more is reserved than the file has.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if any(info.compress_type != zipfile.ZIP_STORED for info in members):
                raise ValueError("compressed")
            # Members that share their bytes would take many times the size of the file.
            if sum(info.file_size for info in members) > len(data):
                raise ValueError("its members are larger than the file")
            return {info.filename.removesuffix(".npy"): _parse_array(archive.read(info)) for info in members}
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, RuntimeError, struct.error, OSError) as error:
        raise ValueError(f"not an .npz file of plain arrays: {error}") from error


def _parse_array(content: bytes) -> NDArray[Any]:
    header = _HEADER.match(content)
    if not header:
        raise ValueError("a member that is no array of one dimension")
    return np.frombuffer(content, header[1].decode(), offset=header.end()).reshape(int(header[2]))
