"""`sret-scale weights`: published checkpoints in, and out again; trained models made deeper, or tied."""

import argparse
from pathlib import Path

IMPORT_EXAMPLE = "example: sret-scale weights import SReT_T.pth sret_t.safetensors --preset sret_t"
EXPORT_EXAMPLE = "example: sret-scale weights export runs/sret_t SReT_T.pth"
GROW_EXAMPLE = "example: sret-scale weights grow runs/sret_t deeper.safetensors --loops 8"
TIE_EXAMPLE = "example: sret-scale weights tie runs/untied tied.safetensors --blocks 1,2,1"
EXAMPLE = "\n".join((IMPORT_EXAMPLE, EXPORT_EXAMPLE, GROW_EXAMPLE, TIE_EXAMPLE))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """import FILE OUT | export FILE OUT | grow RUN OUT | tie RUN OUT."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="import|export|grow|tie")
    to_native, to_published, grow, tie = (
        actions.add_parser(
            name, help=text, description=text, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        for name, text, example in (
            ("import", "convert a published checkpoint to safetensors", IMPORT_EXAMPLE),
            ("export", "convert a trained run, or safetensors, to the published layout", EXPORT_EXAMPLE),
            ("grow", "give a trained model more (or fewer) loops, and measure the effect", GROW_EXAMPLE),
            (
                "tie",
                "merge the blocks of a trained model without loops into a few that loop, and measure the effect",
                TIE_EXAMPLE,
            ),
        )
    )
    for action in (grow, tie):
        action.add_argument("run", type=Path, help="folder of the run")
        action.add_argument("out", type=Path, help="the safetensors file to write")
        action.add_argument(
            "--weights", choices=("raw", "ema"), help="which weights (default: the moving average, if kept)"
        )
        action.add_argument(
            "--shards", help="folder or URL of the shards to measure on (default: the run's test shards)"
        )
    grow.add_argument(
        "--loops", type=int, required=True, help="loops of the stage that has most, the others in proportion"
    )
    tie.add_argument("--blocks", required=True, help="blocks that each stage keeps, separated by commas")
    tie.add_argument("--keep-norms", action="store_true", help="let each loop keep its own LayerNorms")
    to_native.add_argument("file", type=Path, help="the weights to read")
    to_published.add_argument("file", type=Path, help="folder of a run, or weights in safetensors")
    for action in (to_native, to_published):
        action.add_argument("out", type=Path, help="the file to write")
    to_native.add_argument(
        "--preset", help="the model, where the weights do not tell: they show nothing of the slicing"
    )


def run(args: argparse.Namespace) -> None:
    """Convert one file; the output is complete or absent."""
    if args.action == "import":
        _import(args.file, args.out, args.preset)
    elif args.action in ("grow", "tie"):
        _change(args)
    else:
        _export(args.file, args.out)


def _import(file: Path, out: Path, name: str | None) -> None:
    from dataclasses import replace

    from sret_scale.config.run_config import RunConfig
    from sret_scale.model import SReT, preset
    from sret_scale.model.vision.official import from_published, recognised_config
    from sret_scale.model.vision.weight_files import load_published, save_model
    from sret_scale.train.load_run import facts_of

    published, key = load_published(file)
    try:
        if name is None:
            name, config = recognised_config(published)
        else:
            config = preset(name)
            if "head.weight" in published:
                config = replace(config, num_classes=len(published["head.weight"]))
        model = SReT(config)
        model.load_state_dict(from_published(config, published))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{file} does not fit {name or 'any preset'}: {reason}") from error
    # Published models see images as the defaults have them, which are ImageNet's.
    save_model(model, out, facts_of(RunConfig(model=config), None))
    print(
        f"{out}: {name} at {config.image_size} pixels, {config.num_classes} classes{f', from {key!r}' if key else ''}"
    )


def _change(args: argparse.Namespace) -> None:
    """Write the deeper or tied model, and print loss and accuracy before and after."""
    from sret_scale.config.run_config import differences_of, to_plain
    from sret_scale.config.step_depth import proportional_loops
    from sret_scale.model.vision.sret import as_sret
    from sret_scale.model.vision.tie import tied
    from sret_scale.model.vision.weight_files import save_model
    from sret_scale.train.evaluate_main import evaluator_of
    from sret_scale.train.load_run import load_facts

    if args.out.suffix != ".safetensors":
        raise ValueError(f"the file to write must end in .safetensors, got {args.out}")
    model, measure = evaluator_of(args.run, args.shards, args.weights, None)
    if args.action == "grow":
        if args.loops < 1:
            raise ValueError(f"--loops: expected at least 1, got {args.loops}")
        changed = model.with_loops(proportional_loops(model.config, args.loops))
    else:
        try:
            num_blocks = [int(text) for text in args.blocks.split(",")]
        except ValueError as error:
            raise ValueError(f"--blocks: expected numbers such as 1,2,1, got {args.blocks!r}") from error
        changed = tied(as_sret(model, "weights tie"), num_blocks, keeps_norms=args.keep_norms)
    for name, one in (("before", model), ("after", changed)):
        result = measure(one.eval())
        parameters = sum(value.numel() for value in one.parameters())
        print(
            f"{name:<6} loss {result.numbers['loss']:.4f}  top-1 {result.numbers['top1']:.2%}  "
            f"{one.config.num_applications:,} applications  {parameters:,} parameters"
        )
    save_model(changed, args.out, load_facts(args.run))
    lines = differences_of(to_plain(model.config), to_plain(changed.config), "model")
    print(f"{args.out}: train it on with train.initial_weights={args.out} and the run's configuration with")
    for line in lines:
        key, _, change = line.partition(": ")
        print(f"  {key}={change.rpartition(' -> ')[2]}")


def _export(file: Path, out: Path) -> None:
    import torch

    from data_pipelines.atomic_files import replacing
    from sret_scale.model.vision.official import to_published
    from sret_scale.model.vision.sret import as_sret
    from sret_scale.train.load_run import load_facts, load_trained

    model = as_sret(load_trained(file), "the published layout")
    published = {"model": to_published(model.config, model.state_dict()), **load_facts(file)}
    with replacing(out) as stream:
        torch.save(published, stream)
    print(f"{out}: published layout")
