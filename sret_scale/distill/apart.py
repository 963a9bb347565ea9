"""A teacher in ranks of its own: the server that such a rank runs, and what the students of its node have of it.

    student: batches of the next step --> inbox --> teacher: augment, network --> answers --> student: this step's loss

A socket file in a folder that only the job's user can enter joins them: no other machine and no other user reaches it.
Batches travel as bytes of pixels, a fourth of what the teacher sees; it augments them itself with the student's seed,
which gives the same bits.
"""

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from data_pipelines.image.augment import BatchAugment
from data_pipelines.stream.prefetch import Batch
from sret_scale.distill import wire
from sret_scale.distill.teacher import Teacher

CONNECT_TIMEOUT_S = 600.0
"""A teacher rank listens before it loads its weights, so a student waits only for the start of a process."""
_MAX_PATH_BYTES = 107  # unix(7): what a socket's address has room for


def answer_request(
    request: wire.Request, teacher: Teacher, augment: BatchAugment, *, device: torch.device, teacher_input: str
) -> Tensor:
    """logits_BC on the CPU: what the same teacher inside the student's rank would say."""
    images_BCHW = request.images.to(device)
    if teacher_input == "view":
        return teacher(images_BCHW.float() / 255).cpu()
    unit_BCHW, _ = augment(images_BCHW, request.labels.to(device), seed=request.key)
    return teacher(unit_BCHW).cpu()


class TeacherServer:
    """Answers the students of its node, in the order of their requests. Listens from the beginning on.

    It closes nothing when something fails: its connections end with its process, after its error record was written,
    so that the students' complaints come later and the record counts as the first error.
    """

    def __init__(self, file: Path) -> None:
        if len(str(file).encode()) > _MAX_PATH_BYTES:
            raise ValueError(
                f"the path of a socket has at most {_MAX_PATH_BYTES} bytes, got {file}: set a shorter TMPDIR"
            )
        self._file = file
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(file))
        self._listener.listen(1024)
        self._inbox: queue.SimpleQueue[tuple[socket.socket, wire.Request | Exception | None]] = queue.SimpleQueue()

    def serve(
        self,
        answer: Callable[[wire.Request], Tensor],
        *,
        identity: Mapping[str, Any],
        num_students: int,
        num_classes: int,
    ) -> None:
        """Returns when all students have come and ended. Raises ValueError for one of another number of classes."""
        for _ in range(num_students):
            self._welcome(identity, num_classes)
        self._listener.close()
        self._file.unlink()
        num_left = num_students
        while num_left:
            connection, request = self._inbox.get()
            if isinstance(request, Exception):
                raise request
            if request is None:
                connection.close()
                num_left -= 1
                continue
            logits_BC = answer(request)
            try:
                wire.send_answer(connection, request.key, logits_BC)
            except (BrokenPipeError, ConnectionResetError):
                # A student that stops leaves the answers to what it asked ahead; the end of its words follows.
                continue

    def _welcome(self, identity: Mapping[str, Any], num_classes: int) -> None:
        connection, _ = self._listener.accept()
        student, theirs = wire.receive_hello(connection)
        if theirs != num_classes:
            raise ValueError(f"student {student} has {theirs} classes, the teacher {num_classes}")
        wire.send_identity(connection, identity)
        threading.Thread(target=self._listen, args=(connection,), name=f"student {student}", daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        """Reads ahead, so that no student ever waits while the teacher computes."""
        request: wire.Request | None = None
        try:
            while (request := wire.receive_request(connection)) is not None:
                self._inbox.put((connection, request))
            self._inbox.put((connection, None))
        except (EOFError, ConnectionResetError):
            # Killed in the middle of a request.
            self._inbox.put((connection, None))
        except Exception as error:
            # Raised by `serve`: a thread that dies alone would leave the student waiting.
            self._inbox.put((connection, error))


class RemoteTeacher:
    """The teacher ranks of this node, as a student sees them: `ask` ahead, `answer` when the step needs it."""

    def __init__(self, files: Mapping[int, Path], *, student: int, num_classes: int) -> None:
        """files: rank in the job -> its socket. Returns when all teachers are loaded.

        Raises OSError when one does not begin to listen, ValueError when two are not the same.
        """
        self._ranks = list(files)
        self._answers: dict[int, Tensor] = {}
        self._lost: list[tuple[int, BaseException]] = []
        self._changed = threading.Condition()
        self._connections = [_connect(file, rank) for rank, file in files.items()]
        try:
            self.identity = self._met(student, num_classes)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        for rank, connection in zip(self._ranks, self._connections, strict=True):
            threading.Thread(target=self._listen, args=(rank, connection), name=f"teacher {rank}", daemon=True).start()

    def __enter__(self) -> "RemoteTeacher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for connection in self._connections:
            # `close` alone would not reach the teacher while this student's own thread still reads.
            with contextlib.suppress(OSError):  # not connected: the teacher was faster
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    @property
    def num_ranks(self) -> int:
        """How many answer at once."""
        return len(self._ranks)

    def ask(self, key: int, number: int, batch: Batch) -> None:
        """Ask about a batch. `number` counts the requests of all students of the node, and chooses the rank."""
        place = number % len(self._ranks)
        try:
            request = wire.Request(key=key, images=batch.images, labels=batch.labels)
            wire.send_request(self._connections[place], request)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise RuntimeError(self._gone(self._ranks[place])) from error

    def answer(self, key: int) -> Tensor:
        """logits_BC on the CPU of what was asked as `key`. RuntimeError naming the rank when one has ended."""
        with self._changed:
            self._changed.wait_for(lambda: key in self._answers or self._lost)
            if key not in self._answers:
                rank, error = self._lost[0]
                raise RuntimeError(self._gone(rank)) from error
            return self._answers.pop(key)

    def _met(self, student: int, num_classes: int) -> dict[str, Any]:
        """The identity of all teachers."""
        identities = []
        for rank, connection in zip(self._ranks, self._connections, strict=True):
            try:
                wire.send_hello(connection, student, num_classes)
                identities.append(wire.receive_identity(connection))
            except (EOFError, BrokenPipeError, ConnectionResetError) as error:
                raise RuntimeError(self._gone(rank)) from error
        if any(identity != identities[0] for identity in identities):
            raise ValueError(f"the teacher ranks {self._ranks} of this node have different teachers: {identities}")
        return identities[0]

    def _gone(self, rank: int) -> str:
        return f"teacher rank {rank} has ended before its answer; its log says why"

    def _listen(self, rank: int, connection: socket.socket) -> None:
        try:
            while True:
                key, logits_BC = wire.receive_answer(connection)
                with self._changed:
                    self._answers[key] = logits_BC
                    self._changed.notify_all()
        except Exception as error:
            # Its end, this student's own `close`, or words that are not the protocol's: `answer` must not wait on.
            with self._changed:
                self._lost.append((rank, error))
                self._changed.notify_all()


def _connect(file: Path, rank: int) -> socket.socket:
    """A connection to a rank that may only be starting."""
    deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    while True:
        try:
            connection.connect(str(file))
            return connection
        except (FileNotFoundError, ConnectionRefusedError) as error:
            if time.monotonic() > deadline_s:
                connection.close()
                raise OSError(f"teacher rank {rank} did not begin to listen; its log says why") from error
            time.sleep(0.02)
