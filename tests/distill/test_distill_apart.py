"""A teacher in ranks of its own: what goes over the socket, who is who, how many, and the student's weights."""

import itertools
import json
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from data_pipelines.image.augment import AugmentConfig, BatchAugment
from data_pipelines.stream.loader import LoaderState, Step
from data_pipelines.stream.prefetch import Batch
from sret_scale.config.run_config import RunConfig, TrainConfig, to_yaml
from sret_scale.distill import DistillConfig, RemoteTeacher, TeacherServer, answer_request, build_teacher, student_batch
from sret_scale.distill.wire import MAX_BYTES, Request, receive_answer, receive_request, send_answer, send_request
from sret_scale.launch.elastic import Elastic, fit_hosts
from sret_scale.launch.hostfile import Host
from sret_scale.launch.job import NODE_FOLDER, RANKS_OF_NODES
from sret_scale.launch.roles import TeacherPlace, place_of, student_ranks
from sret_scale.train import teacher_plan
from sret_scale.train.distributed import Ranks
from sret_scale.train.teacher_plan import Rates, best_teacher_ranks, with_teacher_ranks
from sret_scale.train.teacher_ranks import asked_ahead
from tests.tiny import tiny_config

TEACHER = f"module:{__name__}:ten_classes"
CPU = torch.device("cpu")


def ten_classes() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    """A random teacher whose answers differ from image to image."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10))
    return layers, (0.3,) * 3, (0.05,) * 3, 32


def a_batch(seed: int, num_rows: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        images=torch.randint(0, 256, (num_rows, 3, 16, 16), dtype=torch.uint8, generator=generator),
        labels=torch.randint(0, 10, (num_rows,), generator=generator),
        indices=torch.arange(num_rows),
        valid=torch.ones(num_rows, dtype=torch.bool),
        views=torch.zeros(num_rows, 5, dtype=torch.int32),
        view_numbers=torch.zeros(num_rows, dtype=torch.int32),
    )


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_messages_arrive_as_they_were_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    batch = a_batch(0)
    send_request(ours, Request(key=2**63 - 1, images=batch.images, labels=batch.labels))
    request = receive_request(theirs)
    assert request is not None and request.key == 2**63 - 1
    assert torch.equal(request.images, batch.images) and torch.equal(request.labels, batch.labels)
    logits = torch.randn(4, 10)
    send_answer(theirs, 7, logits)
    key, answer = receive_answer(ours)
    assert key == 7 and torch.equal(answer, logits)
    ours.close()
    assert receive_request(theirs) is None


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (struct.pack("<8sQIIII", b"SRETASK1", 0, 2**31, 3, 224, 224), "at most"),
        (struct.pack("<8sQIIII", b"SRETASK1", 0, 1, 1, 1, MAX_BYTES + 1), "at most"),
        # A pickle is no message, and nobody tries to load it.
        (b"\x80\x04\x95" + b"cos\nsystem\n(S'touch evil'\ntR." + bytes(10), "expected a message"),
    ],
)
def test_header_that_lies_is_refused_before_anything_is_read(
    pair: tuple[socket.socket, socket.socket], header: bytes, message: str
) -> None:
    pair[0].sendall(header)
    with pytest.raises(ValueError, match=message):
        receive_request(pair[1])


def test_message_cut_off_in_the_middle_is_no_message(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].sendall(struct.pack("<8sQIIII", b"SRETASK1", 0, 1, 3, 8, 8) + bytes(10))
    pair[0].close()
    with pytest.raises(EOFError):
        receive_request(pair[1])


def serving(file: Path, num_students: int, identity: dict[str, Any] | None = None) -> threading.Thread:
    """A server of plain views, in a thread: augmentation would use torch's one global generator in two threads."""
    server = TeacherServer(file)
    teacher = build_teacher(TEACHER, num_classes=10, device="cpu", load_run=None)  # type: ignore[arg-type]
    augment = BatchAugment(AugmentConfig(), 10)

    def run() -> None:
        server.serve(
            lambda request: answer_request(request, teacher, augment, device=CPU, teacher_input="view"),
            identity=identity or teacher.describe(),
            num_students=num_students,
            num_classes=10,
        )

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_students_get_what_a_teacher_beside_them_says(tmp_path: Path) -> None:
    files = {rank: tmp_path / f"teacher-{rank}" for rank in (2, 3)}
    threads = [serving(file, num_students=2) for file in files.values()]
    live = build_teacher(TEACHER, num_classes=10, device="cpu", load_run=None)  # type: ignore[arg-type]
    augment = BatchAugment(AugmentConfig(randaugment_ops=0, erase_rate=0.0), 10)
    students: list[RemoteTeacher] = []
    openers = [
        threading.Thread(target=lambda n=n: students.append(RemoteTeacher(files, student=n, num_classes=10)))
        for n in (0, 1)
    ]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join(timeout=60)
    assert len(students) == 2 and students[0].identity == json.loads(json.dumps(live.describe()))
    batches = {(student, number): a_batch(10 * student + number) for student in (0, 1) for number in range(6)}
    for (student, number), batch in batches.items():
        students[student].ask(100 * student + number, number, batch)
    for (student, number), batch in reversed(batches.items()):
        key = 100 * student + number
        found, expected = (
            student_batch(batch, augment, teacher, seed=key, device=CPU, teacher_input="view")
            for teacher in (students[student], live)
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))  # type: ignore[arg-type]
    for student_side in students:
        with student_side:
            pass
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert list(tmp_path.iterdir()) == []


def test_teachers_of_one_node_must_be_the_same(tmp_path: Path) -> None:
    files = {rank: tmp_path / f"teacher-{rank}" for rank in (1, 2)}
    for rank, file in files.items():
        serving(file, num_students=1, identity={"weights_sha256": str(rank)})
    with pytest.raises(ValueError, match=r"teacher ranks \[1, 2\] of this node have different teachers"):
        RemoteTeacher(files, student=0, num_classes=10)


@pytest.mark.parametrize(
    "last_words", [b"", b"\x80\x04 no message of this protocol", struct.pack("<8sQII", b"SRETSAY1", 1, 2**31, 2**31)]
)
def test_a_teacher_that_has_ended_is_named(tmp_path: Path, last_words: bytes) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "teacher"))
    listener.listen(1)

    def greet_and_go() -> None:
        connection, _ = listener.accept()
        connection.recv(100)
        connection.sendall(struct.pack("<8sI", b"SRETWHO1", 2) + b"{}" + last_words)
        connection.close()

    threading.Thread(target=greet_and_go, daemon=True).start()
    teacher = RemoteTeacher({5: tmp_path / "teacher"}, student=0, num_classes=10)
    with listener, teacher, pytest.raises(RuntimeError, match="teacher rank 5 has ended before its answer"):
        teacher.answer(1)


@given(
    nodes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    num_teachers=st.integers(0, 4),
)
@settings(max_examples=40, deadline=None)
def test_every_process_has_one_place(nodes: list[int], num_teachers: int) -> None:
    if min(nodes) <= num_teachers:
        with pytest.raises(ValueError, match="expected fewer than the ranks of every node"):
            student_ranks(nodes, num_teachers)
        return
    environment = {RANKS_OF_NODES: ",".join(map(str, nodes)), NODE_FOLDER: "/node"}
    places = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        for first, size in zip(itertools.accumulate([0, *nodes]), nodes, strict=False):
            for local in range(size):
                here = Ranks(rank=first + local, local_rank=local, world_size=sum(nodes), device=CPU)
                places.append(place_of(here, num_teachers))
    students = [place for place in places if isinstance(place, Ranks)]
    teachers = [place for place in places if isinstance(place, TeacherPlace)]
    assert len(teachers) == num_teachers * len(nodes)
    assert [place.rank for place in students] == list(range(len(students)))
    assert {place.world_size for place in students} == {len(students)}
    assert sorted([*(place.place_in_job[0] for place in students), *(t.rank for t in teachers)]) == list(
        range(sum(nodes))
    )
    # Whom a student asks, answers so many students.
    for teacher in teachers:
        asking = [place for place in students if place.beside and place.beside.files.get(teacher.rank) == teacher.file]
        assert len(asking) == teacher.num_students


@pytest.mark.parametrize("num_ahead", [1, 3])
def test_steps_are_asked_about_ahead_and_given_out_in_order(num_ahead: int) -> None:
    events: list[str] = []

    def steps() -> Iterator[Step]:
        try:
            for epoch in itertools.count():
                yield Step(micro_batches=[], next_state=LoaderState(epoch=epoch))
        finally:
            events.append("closed")

    ahead = asked_ahead(steps(), lambda number, step: events.append(f"ask {number}"), first=7, num_ahead=num_ahead)  # type: ignore[arg-type]
    for number in range(3):
        assert next(ahead).next_state.epoch == number
        events.append(f"compute {number + 7}")
    ahead.close()
    asked = {number: events.index(f"ask {number}") for number in range(7, 10 + num_ahead)}
    for number in range(7, 10):
        assert asked[number + num_ahead] < events.index(f"compute {number}")
    assert events[-1] == "closed" and f"ask {10 + num_ahead}" not in events


@given(st.floats(0.1, 100), st.floats(0.1, 100), st.lists(st.integers(2, 9), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_the_planned_number_is_the_fastest_of_all(student: float, teacher: float, nodes: list[int]) -> None:
    train = TrainConfig(global_batch_size=2520 * 2, micro_batch_size=1)
    rates = Rates(student=student, teacher=teacher, device="")
    speeds = {}
    for number in range(1, min(nodes)):
        students = [size - number for size in nodes]
        if train.global_batch_size % sum(students) == 0:
            # Second after second of the slowest node: a student makes `student` images and needs as many answers.
            speeds[number] = min(min(student, teacher * number / count) for count in students) * sum(students)
    if not speeds:
        with pytest.raises(ValueError, match="no number of teacher ranks"):
            best_teacher_ranks(rates, nodes, train)
        return
    best = best_teacher_ranks(rates, nodes, train)
    assert speeds[best] == pytest.approx(max(speeds.values()))
    assert rates.of_job(nodes, best) <= rates.beside(sum(nodes)) * 1.000001


def test_a_kept_number_is_measured_again_where_it_cannot_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = replace(
        tiny_config(tmp_path / "shards"),
        train=TrainConfig(global_batch_size=12, micro_batch_size=1),
        distill=DistillConfig(teacher="run:x", num_teacher_ranks="auto"),
    )
    kept = replace(asked, distill=replace(asked.distill, num_teacher_ranks=2))
    (tmp_path / "config.yaml").write_text(to_yaml(kept))
    measured: list[RunConfig] = []

    def rates(config: RunConfig) -> Rates:
        measured.append(config)
        return Rates(student=1.0, teacher=100.0, device="CPU")

    monkeypatch.setattr(teacher_plan, "_measured_apart", rates)
    assert with_teacher_ranks(asked, tmp_path, [4]) == kept and not measured
    for nodes, is_fresh in (([4], True), ([2], False), ([7, 7], False)):
        found = with_teacher_ranks(asked, tmp_path, nodes, is_fresh=is_fresh)
        assert found.distill.num_teacher_ranks == 1, nodes
    assert len(measured) == 3 and "warning" not in capsys.readouterr().out
    # A login node without the nodes' devices measures something else, and says so.
    with_teacher_ranks(asked, tmp_path, [7, 7], is_elsewhere=True)
    assert "warning: these rates are of this machine's CPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": None, "num_teacher_ranks": 1}, "needs a live teacher"),
        ({"teacher": "labels:x", "num_teacher_ranks": "auto"}, "needs a live teacher"),
        ({"teacher": "run:x", "num_teacher_ranks": -1}, "expected 0 or more, or auto"),
        ({"teacher": "run:x", "num_teacher_ranks": 1, "teacher_placement": "sharded"}, "replicated"),
        ({"teacher": "run:x", "num_teacher_ranks": 1, "feature_weight": 1.0}, "num_teacher_ranks=0"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**fields)


def test_elastic_hosts_share_the_batch_among_their_students() -> None:
    hosts = [Host(name=f"node-{index}", devices=("0", "1", "2")) for index in range(3)]
    train = TrainConfig(global_batch_size=24, micro_batch_size=8)
    used, fitted = fit_hosts(hosts, train, Elastic(minimum=2, maximum=3), num_teacher_ranks=1)
    assert len(used) == 3 and fitted.micro_batch_size == 4
