"""Teacher ranks in a run: what such a rank does, and how a student asks it ahead of its own steps.

While the students compute step n, the teacher ranks answer for step n + 1: without that, one of the two would wait.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Generator
from pathlib import Path

from data_pipelines.image.augment import BatchAugment
from data_pipelines.stream.loader import Step
from sret_scale.config.run_config import RunConfig, grad_accum_steps
from sret_scale.distill import RemoteTeacher, TeacherServer, answer_request
from sret_scale.launch.roles import TeacherPlace
from sret_scale.train.assemble import Clock, Run, identity_of, live_teacher
from sret_scale.train.seeds import derived_seed
from sret_scale.train.stop import StopFlag
from sret_scale.train.watchdog import SERVING, Watchdog


def serve(config: RunConfig, folder: Path, place: TeacherPlace) -> None:
    """Answer the students of this node until all have ended.

    A signal to stop is for the students, which save and leave; a teacher rank that went before them would fail them.
    """
    # Its own time limit would end it in a long evaluation: that it hangs, the students that wait for it notice.
    watchdog = Watchdog(folder, rank=place.rank, world_size=place.job_size, timeout_s=math.inf)
    with StopFlag(), watchdog:
        watchdog.progress(0, SERVING)
        server = TeacherServer(place.file)
        teacher = live_teacher(config, place.device)
        identity = identity_of(teacher, config)
        assert identity is not None, "the configuration was checked: this teacher is live"
        augment = BatchAugment(config.augment, config.model.num_classes)
        server.serve(
            lambda request: answer_request(
                request, teacher, augment, device=place.device, teacher_input=config.distill.teacher_input
            ),
            identity=identity,
            num_students=place.num_students,
            num_classes=config.model.num_classes,
        )


def steps_of(run: Run, clock: Clock) -> Generator[Step]:
    """The steps of a run from `clock` on; teacher ranks are asked about each while those before it are computed."""
    steps = run.loader.steps(clock.loader)
    if not isinstance(run.teacher, RemoteTeacher):
        return steps
    beside, ranks = run.ranks.beside, run.ranks
    assert beside is not None
    teacher = run.teacher
    end = clock.step + math.ceil((run.config.train.total_images - clock.images) / run.loader.global_batch_size)

    def ask(number: int, step: Step) -> None:
        if number >= end:
            return
        for micro_step, batch in enumerate(step.micro_batches):
            key = derived_seed("augment", run.config.train.seed, number, micro_step, ranks.rank)
            place = (number * len(step.micro_batches) + micro_step) * beside.students_of_node + beside.student_of_node
            teacher.ask(key, place, batch)

    return asked_ahead(steps, ask, first=clock.step, num_ahead=num_ahead(run))


def asked_ahead(
    steps: Generator[Step], ask: Callable[[int, Step], None], *, first: int, num_ahead: int
) -> Generator[Step]:
    """`steps`, numbered from `first`; each is asked about when `num_ahead` others are yet to be given out before it."""
    waiting: deque[Step] = deque()
    with contextlib.closing(steps):
        for number, step in enumerate(steps, start=first):
            ask(number, step)
            waiting.append(step)
            if len(waiting) > num_ahead:
                yield waiting.popleft()


def num_ahead(run: Run) -> int:
    """Steps that are asked about ahead, so that every teacher rank of the node has a batch to answer."""
    assert isinstance(run.teacher, RemoteTeacher) and run.ranks.beside is not None
    micro_steps = grad_accum_steps(run.config.train, run.ranks.world_size)
    per_step = run.ranks.beside.students_of_node * micro_steps
    return max(1, -(-run.teacher.num_ranks // per_step))
