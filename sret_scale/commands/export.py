"""`sret-scale export`: a trained model as a file that runs without this package."""

import argparse
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.extras import install_extra
from sret_scale.commands.arguments import WEIGHTS

EXAMPLE = """examples:
  sret-scale export runs/sret_t sret_t.onnx
  sret-scale export sret_t.safetensors sret_t.onnx --loops kept"""

# Largest difference of a score between the exported program and the model, both in fp32.
TOLERANCE = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE OUT --format."""
    parser.add_argument("file", type=Path, help="folder of a run, one of its checkpoints, or weights in safetensors")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--weights", **WEIGHTS)
    parser.add_argument(
        "--format",
        choices=("onnx", "torch", "safetensors"),
        default="onnx",
        help="onnx, a torch.export program, or bare weights; the first two take any batch size",
    )
    parser.add_argument(
        "--loops",
        choices=("unrolled", "kept"),
        default="unrolled",
        help="unrolled: one application after another; kept: as loops, so that the program grows only by what each "
        "loop owns",
    )


def run(args: argparse.Namespace) -> None:
    """Write the file, after checking that it answers as the model does; the output is complete or absent."""
    import warnings

    import torch

    from data_pipelines.atomic_files import replacing
    from sret_scale.model.config import ImageConfig
    from sret_scale.model.loop_export import keep_loops
    from sret_scale.model.vision.for_inference import folded
    from sret_scale.model.vision.weight_files import save_model
    from sret_scale.train.load_run import load_facts, load_trained

    if args.format == "safetensors" and args.loops == "kept":
        raise ValueError("--loops kept is for the formats onnx and torch: safetensors holds weights and no program")
    model, facts = load_trained(args.file, args.weights), load_facts(args.file)
    if args.format == "safetensors":
        save_model(model, args.out, facts)
        print(f"{args.out}: safetensors")
        return
    if not isinstance(model.config, ImageConfig):
        raise ValueError(f"{args.format}: expected a model of images, got one of kind {model.config.kind!r}")
    if args.format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"{package} is not installed: {install_extra('export')}")
    images_BCHW = torch.randn(model.config.example(2).shape, generator=torch.Generator().manual_seed(0))
    shapes = ({0: torch.export.Dim("batch")},)
    ready = folded(model)
    if args.loops == "kept":
        keep_loops(ready)
    with warnings.catch_warnings(), replacing(args.out) as file:
        # torch's exporters warn of their own internals, which says nothing about this model.
        warnings.simplefilter("ignore")
        partial = Path(file.name)
        program = torch.export.export(ready, (images_BCHW,), dynamic_shapes=shapes)
        if args.format == "torch":
            files = {f"{name}.json": json.dumps(value) for name, value in facts.items()}
            torch.export.save(program, partial, extra_files=files)
        else:
            torch.onnx.export(
                program,
                (images_BCHW,),
                partial,
                input_names=["images"],
                output_names=["scores"],
                dynamic_shapes=({0: "batch"},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            strip_traces(partial, facts)
        difference = _difference(model, partial, args.format)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"the exported program differs from the model by {difference:.1e}, more than {TOLERANCE:g}"
            )
    print(f"{args.out}: {args.format}, largest difference from the model {difference:.1e}")


def strip_traces(file: Path, facts: Mapping[str, Any]) -> None:
    """Put what goes with the weights into an ONNX file, and take out where in the code each node was traced.

    The traces are 9 of 10 bytes of a small file.
    """
    import onnx

    model = onnx.load(file)
    graphs = [model.graph, *model.functions]
    while graphs:
        graph = graphs.pop()
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
            graphs.extend(attribute.g for attribute in node.attribute if attribute.HasField("g"))
    for name, value in facts.items():
        model.metadata_props.add(key=name, value=json.dumps(value))
    onnx.save(model, file)


def _difference(model, file: Path, file_format: str) -> float:  # type: ignore[no-untyped-def]
    """Largest difference of a score between the exported program and the model, at another batch size."""
    import torch

    images_BCHW = torch.randn(model.config.example(3).shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images_BCHW)
        if file_format == "torch":
            found = torch.export.load(file).module()(images_BCHW)
        else:
            import onnxruntime

            session = onnxruntime.InferenceSession(str(file))
            found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images_BCHW.numpy()})[0])
    return float((found - expected).abs().max())
