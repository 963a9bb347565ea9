"""What the students and the teacher ranks of a node say to each other: fixed headers and raw arrays, nothing else.

    student -> teacher   hello: its number, its classes      teacher -> student   its identity, as JSON
    student -> teacher   request: key, uint8 images, labels  teacher -> student   answer: key, fp32 logits

No pickle, so nothing that is read can run code; and what a header announces is bounded before room is made for it.
Shapes: B batch, C classes (channels in BCHW), H height, W width.
"""

import json
import math
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_HELLO = struct.Struct("<8sII")
_IDENTITY = struct.Struct("<8sI")
_REQUEST = struct.Struct("<8sQIIII")
_ANSWER = struct.Struct("<8sQII")
# The last digit is the version of the protocol; both ends are of one job, and so of one version.
_MAGIC = {_HELLO: b"SRETHEL1", _IDENTITY: b"SRETWHO1", _REQUEST: b"SRETASK1", _ANSWER: b"SRETSAY1"}
MAX_BYTES = 1 << 31
"""Of the arrays in a message: 14,000 images of 224 pixels."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A micro-batch that a student wants answered; `key` is the seed of its augmentation, and unlike any other."""

    key: int
    images: Tensor  # uint8 (B, C, H, W)
    labels: Tensor  # int64 (B,)


def send_hello(connection: socket.socket, student: int, num_classes: int) -> None:
    """The first words of a student."""
    connection.sendall(_HELLO.pack(_MAGIC[_HELLO], student, num_classes))


def receive_hello(connection: socket.socket) -> tuple[int, int]:
    """(number of the student, its classes)"""
    student, num_classes = _header(connection, _HELLO)
    return student, num_classes


def send_identity(connection: socket.socket, identity: Mapping[str, Any]) -> None:
    """What decides on the teacher's answers."""
    text = json.dumps(identity).encode()
    connection.sendall(_IDENTITY.pack(_MAGIC[_IDENTITY], len(text)) + text)


def receive_identity(connection: socket.socket) -> dict[str, Any]:
    """What `send_identity` sent."""
    [num_bytes] = _header(connection, _IDENTITY)
    _check_size(num_bytes)
    identity: dict[str, Any] = json.loads(_exactly(connection, num_bytes))
    return identity


def send_request(connection: socket.socket, request: Request) -> None:
    """Blocks until the teacher rank, which always listens, has taken it."""
    connection.sendall(_REQUEST.pack(_MAGIC[_REQUEST], request.key, *request.images.shape))
    connection.sendall(_view(request.images.contiguous().numpy()))
    connection.sendall(_view(request.labels.contiguous().numpy()))


def receive_request(connection: socket.socket) -> Request | None:
    """The next request; None when the student has ended."""
    try:
        key, *shape = _header(connection, _REQUEST)
    except EOFError:
        return None
    images = _array(connection, tuple(shape), np.uint8)
    return Request(key=key, images=images, labels=_array(connection, (shape[0],), np.int64))


def send_answer(connection: socket.socket, key: int, logits_BC: Tensor) -> None:
    """logits_BC: fp32 on the CPU."""
    connection.sendall(_ANSWER.pack(_MAGIC[_ANSWER], key, *logits_BC.shape))
    connection.sendall(_view(logits_BC.contiguous().numpy()))


def receive_answer(connection: socket.socket) -> tuple[int, Tensor]:
    """(key of the request, logits_BC). Raises EOFError when the teacher rank has ended."""
    key, *shape = _header(connection, _ANSWER)
    return key, _array(connection, tuple(shape), np.float32)


def _view(array: NDArray[Any]) -> memoryview:
    return array.data.cast("B")


def _header(connection: socket.socket, header: struct.Struct) -> list[int]:
    """The numbers of a header. Raises EOFError when the other end has closed, ValueError for anything else."""
    magic, *numbers = header.unpack(_exactly(connection, header.size))
    if magic != _MAGIC[header]:
        raise ValueError(f"expected a message {_MAGIC[header]!r} of a teacher or student rank, got {magic!r}")
    return numbers


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_BYTES:
        raise ValueError(f"a message of {num_bytes:,} bytes between teacher and student ranks: at most {MAX_BYTES:,}")


def _array(connection: socket.socket, shape: tuple[int, ...], kind: Any) -> Tensor:
    num_bytes = math.prod(shape) * np.dtype(kind).itemsize
    _check_size(num_bytes)
    return torch.from_numpy(np.frombuffer(_exactly(connection, num_bytes), kind).reshape(shape))


def _exactly(connection: socket.socket, num_bytes: int) -> bytearray:
    """So many bytes; EOFError when the other end has closed, in the middle of a message too."""
    data = bytearray(num_bytes)
    room = memoryview(data)
    while room:
        num_read = connection.recv_into(room)
        if num_read == 0:
            raise EOFError("the other end has closed")
        room = room[num_read:]
    return data
