"""`sret-scale weights`: published checkpoints in, and out again."""

import argparse
from pathlib import Path

IMPORT_EXAMPLE = "example: sret-scale weights import SReT_T.pth sret_t.safetensors --preset sret_t"
EXPORT_EXAMPLE = "example: sret-scale weights export sret_t.safetensors SReT_T.pth"
EXAMPLE = f"{IMPORT_EXAMPLE}\n{EXPORT_EXAMPLE}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """import FILE OUT | export FILE OUT."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="import|export")
    to_native, to_published = (
        actions.add_parser(
            name, help=text, description=text, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        for name, text, example in (
            ("import", "read a published checkpoint, write safetensors", IMPORT_EXAMPLE),
            ("export", "read safetensors, write the published layout", EXPORT_EXAMPLE),
        )
    )
    for action in (to_native, to_published):
        action.add_argument("file", type=Path, help="the weights to read")
        action.add_argument("out", type=Path, help="the file to write")
    to_native.add_argument(
        "--preset", help="the model, where the weights do not say it: slicing leaves no trace in them"
    )


def run(args: argparse.Namespace) -> None:
    """Convert one file; the output is complete or absent."""
    if args.action == "import":
        _import(args.file, args.out, args.preset)
    else:
        _export(args.file, args.out)


def _import(file: Path, out: Path, name: str | None) -> None:
    from dataclasses import replace

    from sret_scale.model import SReT, preset
    from sret_scale.model.files import load_published, save_model
    from sret_scale.model.official import from_published, recognised_config

    published = load_published(file)
    if name is None:
        name, config = recognised_config(published)
    else:
        config = preset(name)
        if "head.weight" in published:
            config = replace(config, num_classes=len(published["head.weight"]))
    model = SReT(config)
    try:
        model.load_state_dict(from_published(config, published))
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit {name}: {str(error).splitlines()[-1].strip()}") from error
    save_model(model, out)
    print(f"{out}: {name} at {config.image_size} pixels, {config.num_classes} classes")


def _export(file: Path, out: Path) -> None:
    import torch

    from sret_scale.model.files import load_model
    from sret_scale.model.official import to_published

    model = load_model(file)
    partial = out.with_name(out.name + ".partial")
    torch.save({"model": to_published(model.config, model.state_dict())}, partial)
    partial.replace(out)
    print(f"{out}: published layout")
