"""How many ranks of a node are best given to the teacher (`distill.num_teacher_ranks=auto`): from two measured rates.

With n ranks a node, s seconds of a training step for each image and t of the teacher's answer, T teacher ranks keep up
with min((n - T) / s, T / t) images a second. Beside each student the teacher costs n / (s + t), which no T exceeds;
ranks apart are for memory: a student has its device for itself, a teacher its own micro-batch.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from sret_scale.config.ds_config import load_ds_config, precision_of
from sret_scale.config.precision import autocast
from sret_scale.config.run_config import RunConfig, TrainConfig, from_yaml, grad_accum_steps, to_yaml
from sret_scale.launch.roles import student_ranks
from sret_scale.memory import MemoryConfig, apply_recomputation
from sret_scale.model import Noise, SReT
from sret_scale.runs.run_folder import RunFolder
from sret_scale.train.distributed import ranks_from_environment

CPU_NAME = "CPU"
MEASURED_PASSES = 3
"""The fastest of so many counts: the first one warms up."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Images a second of one device: of a student's forward and backward pass, and of the teacher's answers."""

    student: float
    teacher: float
    device: str

    def of_job(self, ranks_of_nodes: Sequence[int], num_teacher_ranks: int) -> float:
        """Images a second of a job. All students take steps together, so the slowest node decides."""
        students = student_ranks(ranks_of_nodes, num_teacher_ranks)
        served = min(num_teacher_ranks * self.teacher / number for number in students)
        return sum(students) * min(self.student, served)

    def beside(self, num_ranks: int) -> float:
        """Images a second of a job whose students each have the teacher beside them."""
        return num_ranks / (1 / self.student + 1 / self.teacher)


def best_teacher_ranks(rates: Rates, ranks_of_nodes: Sequence[int], train: TrainConfig) -> int:
    """The number with the highest rate among those whose students share the global batch; the smaller one of equals.

    Raises ValueError where there is none.
    """
    possible = [number for number in range(1, min(ranks_of_nodes)) if _fits(ranks_of_nodes, number, train)]
    if not possible:
        raise ValueError(
            f"distill.num_teacher_ranks=auto: with {list(ranks_of_nodes)} ranks a node, no number of teacher ranks "
            f"leaves students that share train.global_batch_size={train.global_batch_size} in micro-batches of "
            f"{train.micro_batch_size}: change one of the two, or the number of ranks"
        )
    return max(possible, key=lambda number: (rates.of_job(ranks_of_nodes, number), -number))


def _fits(ranks_of_nodes: Sequence[int], number: int, train: TrainConfig) -> bool:
    try:
        grad_accum_steps(train, sum(student_ranks(ranks_of_nodes, number)))
    except ValueError:
        return False
    return True


def with_teacher_ranks(
    config: RunConfig, run: Path, ranks_of_nodes: Sequence[int], *, is_fresh: bool = False, is_elsewhere: bool = False
) -> RunConfig:
    """`config` with a number in the place of `auto`: that of the run which is continued, or the best one by measuring.

    A fresh run, and one whose number these nodes cannot have, is measured again.

    It is measured on this machine, in a process of its own that leaves no memory occupied; the result is printed, and
    with it a doubt where the run is `is_elsewhere`: a login node's CPU says nothing about other nodes' GPUs.
    """
    if config.distill.num_teacher_ranks != "auto":
        return config
    file = RunFolder(run).config
    kept = from_yaml(file).distill.num_teacher_ranks if file.exists() and not is_fresh else 0
    if kept and kept != "auto" and kept < min(ranks_of_nodes) and _fits(ranks_of_nodes, kept, config.train):
        return _with(config, kept)
    # Said before seconds are spent on measuring.
    best_teacher_ranks(Rates(student=1.0, teacher=1.0, device=""), ranks_of_nodes, config.train)
    rates = _measured_apart(config)
    number = best_teacher_ranks(rates, ranks_of_nodes, config.train)
    others = [other for other in range(1, min(ranks_of_nodes)) if _fits(ranks_of_nodes, other, config.train)]
    table = ", ".join(f"{other}: {rates.of_job(ranks_of_nodes, other):,.1f}" for other in others)
    print(
        f"teacher ranks: measured here ({rates.device}), a student trains on {rates.student:,.1f} images/s and a "
        f"teacher answers for {rates.teacher:,.1f}; images/s of the job by teacher ranks per node: {table} (with a "
        f"teacher beside each student: {rates.beside(sum(ranks_of_nodes)):,.1f}); chosen: {number}",
        flush=True,
    )
    if is_elsewhere and rates.device == CPU_NAME:
        print(
            "warning: these rates are of this machine's CPU: if the nodes of the run have GPUs, start it on one of "
            "them, or set distill.num_teacher_ranks to a number",
            flush=True,
        )
    return _with(config, number)


def _with(config: RunConfig, number: int) -> RunConfig:
    return dataclasses.replace(config, distill=dataclasses.replace(config.distill, num_teacher_ranks=number))


def _measured_apart(config: RunConfig) -> Rates:
    """ValueError with the last words of a measurement that failed."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "config.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        command = [sys.executable, "-m", "sret_scale.train.teacher_plan", str(file)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        words = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"distill.num_teacher_ranks=auto: the rates cannot be measured here: {words}")
    return Rates(**json.loads(answer.stdout.splitlines()[-1]))


def measured_rates(config: RunConfig) -> Rates:
    """Both rates on this process's device, at the micro-batches of the configuration."""
    # Here, because deepspeed comes with it: a launcher imports this module too, and need not wait for that.
    from sret_scale.train.assemble import live_teacher

    device = ranks_from_environment().device
    size = config.train.micro_batch_size
    unit_BCHW = torch.rand(size, config.model.in_channels, config.model.image_size, config.model.image_size)
    unit_BCHW = unit_BCHW.to(device)
    teacher = live_teacher(config, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else CPU_NAME
    return Rates(
        student=size / student_step_s(config, device, size),
        teacher=size / _fastest_s(lambda _: teacher(unit_BCHW), device),
        device=name,
    )


def student_step_s(config: RunConfig, device: torch.device, micro_batch_size: int) -> float:
    """Seconds of a forward and backward pass of the model, with its recomputation where no budget asks for a plan."""
    model = SReT(config.model).to(device).train()
    memory = config.memory
    apply_recomputation(model, MemoryConfig() if memory.budget_bytes is not None else memory)
    shape = (micro_batch_size, config.model.in_channels, config.model.image_size, config.model.image_size)
    images_BCHW = torch.zeros(shape, device=device)
    labels_B = torch.zeros(micro_batch_size, dtype=torch.int64, device=device)
    precision = precision_of(load_ds_config(config.engine.ds_config))

    def step(number: int) -> None:
        with autocast(device.type, precision):
            scores_BC = model(images_BCHW, Noise(permutation_seed=number, sample_seed=number))
        F.cross_entropy(scores_BC.float(), labels_B).backward()  # type: ignore[no-untyped-call]

    return _fastest_s(step, device)


def _fastest_s(work: Callable[[int], object], device: torch.device) -> float:
    taken_s = []
    for number in range(MEASURED_PASSES):
        started_s = time.perf_counter()
        work(number)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken_s.append(time.perf_counter() - started_s)
    return min(taken_s)


def main() -> None:
    """Prints the rates of a configuration as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    print(json.dumps(dataclasses.asdict(measured_rates(from_yaml(parser.parse_args().config)))))


if __name__ == "__main__":
    main()
