"""Which ranks of a job train and which only answer for a teacher (`distill.num_teacher_ranks`).

    node 1: s0 s1 s2 | t        the last ranks of every node are its teachers; the students of all nodes
    node 2: s3 s4 s5 | t        are a world of their own, numbered on, and DeepSpeed sees nobody else

Two worlds need no process group with holes in it, and a teacher's answers never leave its node.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sret_scale.config.run_config import RunConfig
from sret_scale.launch.job import NODE_FOLDER, RANKS_OF_NODES
from sret_scale.train.distributed import Ranks, TeacherRanks


@dataclass(frozen=True, kw_only=True)
class TeacherPlace:
    """The place of a process that only answers."""

    rank: int
    job_size: int
    device: torch.device
    file: Path
    """The socket on which it answers."""
    num_students: int
    """Of its node."""


def teacher_ranks_of(config: RunConfig) -> int:
    """Teacher ranks of every node; the launcher has put a number in the place of `auto`."""
    number = config.distill.num_teacher_ranks
    assert number != "auto"
    return number


def student_ranks(ranks_of_nodes: Sequence[int], num_teacher_ranks: int) -> list[int]:
    """How many students every node has. ValueError where one would have none."""
    for number in ranks_of_nodes:
        if number <= num_teacher_ranks:
            raise ValueError(
                f"distill.num_teacher_ranks={num_teacher_ranks}: expected fewer than the ranks of every node, got a "
                f"node of {number}: use fewer teacher ranks, or more ranks a node"
            )
    return [number - num_teacher_ranks for number in ranks_of_nodes]


def num_students(config: RunConfig, ranks_of_nodes: Sequence[int]) -> int:
    """The ranks of a job that train: they share its global batch and its optimizer's state.

    ValueError for `auto`, which stands for a number only when a run starts, and where a node would have no student.
    """
    if config.distill.num_teacher_ranks == "auto":
        raise ValueError(
            "distill.num_teacher_ranks=auto: expected a number, since the ranks that train are counted here; "
            "`train --dry-run` finds the best"
        )
    return sum(student_ranks(ranks_of_nodes, teacher_ranks_of(config)))


def place_of(ranks: Ranks, num_teacher_ranks: int) -> Ranks | TeacherPlace:
    """Where this process stands. `ranks`: its place in the whole job, as the launcher wrote it."""
    if num_teacher_ranks == 0:
        return ranks
    counts = [int(number) for number in os.environ.get(RANKS_OF_NODES, str(ranks.world_size)).split(",")]
    students = student_ranks(counts, num_teacher_ranks)
    first = ranks.rank - ranks.local_rank
    node = next(index for index in range(len(counts)) if sum(counts[:index]) == first)
    folder = Path(os.environ[NODE_FOLDER])
    teachers = range(first + students[node], first + counts[node])
    files = {rank: folder / f"teacher-{rank}" for rank in teachers}
    if ranks.rank in files:
        return TeacherPlace(
            rank=ranks.rank,
            job_size=ranks.world_size,
            device=ranks.device,
            file=files[ranks.rank],
            num_students=students[node],
        )
    beside = TeacherRanks(
        files=files,
        student_of_node=ranks.local_rank,
        students_of_node=students[node],
        rank_in_job=ranks.rank,
        job_size=ranks.world_size,
    )
    number = sum(students[:node]) + ranks.local_rank
    return replace(ranks, rank=number, world_size=sum(students), beside=beside)
