"""Saves a run and takes it up again: what has to be kept so that it continues with the same bits."""

from collections.abc import Iterator

from data_pipelines.stream.loader import LoaderState
from sret_scale.config.run_config import to_plain
from sret_scale.model.vision.weight_files import read_metadata, save_model
from sret_scale.runs.checkpoint import newest_valid, read_state, read_tensors
from sret_scale.train.assemble import Clock, Run
from sret_scale.train.distributed import from_rank
from sret_scale.train.engine.snapshot import RankTensor
from sret_scale.train.evaluate import Evaluation
from sret_scale.train.load_run import check_architecture, check_tokens, facts_of, initial_state


def tensors_of(run: Run) -> Iterator[RankTensor]:
    """Every tensor that decides how the run goes on, as far as this rank has it."""
    yield from run.engine.rank_tensors("weights", run.engine.local_weights())
    yield from run.engine.optimizer_tensors()
    if run.average:
        yield from run.engine.rank_tensors("ema", run.average.averages)
        yield from run.engine.rank_tensors("ema_statistics", run.average.statistics)


def save(run: Run, clock: Clock) -> None:
    """Begin a checkpoint of everything that decides how the run goes on, as it is now; all ranks must call it."""
    state = {
        "images": clock.samples,
        "time_s": clock.time_s,
        "loader": clock.loader.to_json(),
        "skipped_steps": clock.skipped_steps,
        "loss_scale": run.engine.loss_scale.to_json() if run.engine.loss_scale else None,
        "missed_updates": dict(run.engine.missed_updates),
        "ema_updates": run.average.num_updates if run.average else 0,
        "is_evaluated": clock.is_evaluated,
        "model": to_plain(run.config.model),
        **facts_of(run.config, run.train_shards.class_names),
        "teacher": run.teacher_identity,
    }
    run.writer.start(tensors_of(run), step=clock.step, state=state)


def keep_best(run: Run, clock: Clock, kind: str, result: Evaluation) -> None:
    """Keep the weights that were evaluated, on rank 0, where no evaluation of the run before was better."""
    file, number = run.folder.best, result.numbers[run.task.best]
    if run.ranks.is_main and not (file.exists() and number <= float(read_metadata(file)["best"])):
        facts = facts_of(run.config, run.train_shards.class_names)
        save_model(run.eval_model, file, {**facts, "step": clock.step, "weights": kind, "best": number})


def restore(run: Run) -> Clock:
    """Load the newest whole checkpoint into the run, on whose choice all ranks agree; the start where there is none."""
    checkpoint = from_rank(newest_valid(run.folder.checkpoints, run.progress.say) if run.ranks.is_main else None)
    if checkpoint is None:
        if run.config.train.initial_weights:
            run.engine.load_weights(initial_state(run.config.train.initial_weights, run.config.model))
        return Clock()
    state = read_state(checkpoint)
    check_architecture(run.config.model, state["model"], str(checkpoint))
    check_tokens(state, run.config.data.tokens, checkpoint)
    if state["teacher"] != run.teacher_identity:
        raise ValueError(
            f"{checkpoint} learned from another teacher: {state['teacher']}, now it is {run.teacher_identity}; "
            "give it the teacher of the interrupted run, or start over with --fresh"
        )
    run.engine.load_weights(read_tensors(checkpoint, "weights"))
    run.engine.load_optimizer_state(read_tensors(checkpoint, "optimizer"), state.get("missed_updates", {}))
    if run.engine.loss_scale and state.get("loss_scale"):
        run.engine.loss_scale.restore(state["loss_scale"])
    if run.average:
        run.average.averages = run.engine.partition(read_tensors(checkpoint, "ema"))
        run.average.num_updates = state["ema_updates"]
        measured = read_tensors(checkpoint, "ema_statistics")
        run.average.statistics = {name: value.to(run.ranks.device) for name, value in measured.items()}
    clock = Clock(
        step=state["step"],
        samples=state["images"],
        time_s=state["time_s"],
        is_evaluated=state["is_evaluated"],
        skipped_steps=state.get("skipped_steps", 0),
        loader=LoaderState.from_json(state["loader"]),
    )
    run.progress.continue_from(clock.samples)
    run.progress.say(f"{run.folder.path.name}: continues from {checkpoint.name} ({clock.samples:,} {run.task.unit})")
    return clock
