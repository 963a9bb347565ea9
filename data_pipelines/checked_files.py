"""Files from elsewhere: opened only where they are regular, read only within a bound, checked by a schema before use.

path -> open_regular -> read_bounded (at most max_bytes) -> parse_checked (JSON, strict) -> an object of the schema
"""

import json
import os
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import pydantic

Schema = TypeVar("Schema")

MAX_JSON_BYTES = 64 * 2**20
# Building the checks of a schema takes milliseconds, and a file of lines asks for them again and again.
_adapter: Callable[[Any], pydantic.TypeAdapter[Any]] = cache(pydantic.TypeAdapter)
_KINDS = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket"}


def plain_name(name: str) -> str:
    """`name`, if it can only be that of a file in the folder it is joined to. Raises ValueError for any other."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError("expected a plain file name")
    return name


# For schemas: every name in a file from elsewhere that is joined to a folder is one of these.
PlainName = Annotated[str, pydantic.AfterValidator(plain_name)]


def printable(text: object) -> str:
    """Text from elsewhere as a terminal may have it: what it would obey, or could not write, as an escape."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in str(text))


def open_regular(path: str | Path) -> BinaryIO:
    """The file, open for reading. Raises ValueError at once for a pipe, a device or another thing that is no file."""
    return os.fdopen(regular_descriptor(path), "rb")


def regular_descriptor(path: str | Path) -> int:
    """A descriptor of the file, as `open_regular` opens it."""
    # Without O_NONBLOCK the opening of a pipe waits for a writer; reads of a regular file do not know it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    kind = next((kind for is_kind, kind in _KINDS.items() if is_kind(mode)), "a device")
    raise ValueError(f"{path}: expected a regular file, got {kind}; name a file")


def read_bounded(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The content of a regular file. Raises ValueError, before it is read, where it is longer than `max_bytes`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # One byte more than the bound shows a file that grows while it is read.
        data = file.read(max_bytes + 1) if size <= max_bytes else b""
    if max(size, len(data)) > max_bytes:
        raise ValueError(f"{path}: {size:,} bytes, expected at most {max_bytes:,}; this is not the file meant here")
    return data


def parse_checked(data: bytes, schema: type[Schema], source: str | Path) -> Schema:
    """JSON as an instance of `schema`: a dataclass, a TypedDict or any other type that pydantic knows.

    Types are strict: no text for a number, no fraction for a whole one. Raises ValueError with `source` and the place.
    """
    try:
        try:
            return _adapter(schema).validate_json(data, strict=True)
        except pydantic.ValidationError as error:
            # Names that are not UTF-8 stand in JSON as lone surrogates ("\\udce9"), which only Python's parser takes.
            if error.errors()[0]["type"] != "json_invalid" or b"\\ud" not in data.lower():
                raise
            return _adapter(schema).validate_python(json.loads(data))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not JSON, or damaged ({error})") from None
    if first["type"] == "json_invalid":
        raise ValueError(f"{source}: not JSON, or damaged ({first['msg']})")
    place = ".".join(map(str, first["loc"])) or "the content"
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason.replace("Input should be", "expected").replace("Field required", "missing")
    # What the file holds is shown cut, and without characters that a terminal obeys.
    got = "" if first["type"] == "missing" else f", got {ascii(first['input'])[:60]}"
    raise ValueError(f"{source}: {ascii(place)[1:-1]}: {reason}{got}")


def read_checked(path: str | Path, schema: type[Schema], max_bytes: int = MAX_JSON_BYTES) -> Schema:
    """A JSON file as an instance of `schema`. Raises ValueError with the file and what is wrong in it, or OSError."""
    return parse_checked(read_bounded(path, max_bytes), schema, path)
