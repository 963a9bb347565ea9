"""Small sources of every kind for the tests of the shard writer."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

IMAGENET_LIKE = ("n01440764", "n01443537", "n01484850")


def pixels(seed: int, width: int = 24, height: int = 20) -> Image.Image:
    """A smooth picture, so that JPEG keeps it recognisable."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(seed: int, width: int = 24, height: int = 20) -> bytes:
    return encoded(pixels(seed, width, height))


def make_tree(root: Path, num_images: int = 8) -> Path:
    """An image folder of three classes with `num_images` JPEG files each."""
    for number, name in enumerate(IMAGENET_LIKE):
        (root / name).mkdir(parents=True)
        for index in range(num_images):
            (root / name / f"{name}_{index}.JPEG").write_bytes(jpeg(100 * number + index))
    return root


def make_tar(path: Path, files: dict[str, bytes]) -> Path:
    """A tar as GNU tar would write it."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_ilsvrc(folder: Path, num_images: int = 5) -> Path:
    """The two tars of ILSVRC 2012 in small, and the development kit, whose class numbers have another order."""
    from scipy.io import savemat

    folder.mkdir(parents=True)
    classes = {}
    for number, name in enumerate(IMAGENET_LIKE):
        files = {f"{name}_{index}.JPEG": jpeg(100 * number + index) for index in range(num_images)}
        classes[f"{name}.tar"] = make_tar(folder / f"{name}.tar", files).read_bytes()
        (folder / f"{name}.tar").unlink()
    make_tar(folder / "ILSVRC2012_img_train.tar", classes)
    names = [f"ILSVRC2012_val_{index:08d}.JPEG" for index in range(1, 7)]
    # Not in the order of their names, as in the real one.
    make_tar(folder / "ILSVRC2012_img_val.tar", {name: jpeg(int(name[15:23])) for name in reversed(names)})
    kinds = [("ILSVRC2012_ID", "i4"), ("WNID", "O")]
    table = np.array([(1, "n01484850"), (2, "n01440764"), (3, "n01443537"), (4, "n00000001")], dtype=kinds)
    mat = io.BytesIO()
    savemat(mat, {"synsets": table})
    truth = b"2\n1\n3\n3\n2\n1\n"
    kit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": mat.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth,
    }
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        for name, content in kit.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return folder


def make_parquet(folder: Path, num_images: int = 7) -> Path:
    """Two Parquet files as the `datasets` library writes them."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as parquet

    folder.mkdir(parents=True)
    features = {"image": {"_type": "Image"}, "label": {"names": list(IMAGENET_LIKE), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for number in range(2):
        rows = [{"bytes": jpeg(10 * number + index), "path": f"{index}.jpg"} for index in range(num_images)]
        labels = [index % 3 for index in range(num_images)]
        table = pa.table({"image": rows, "label": pa.array(labels, pa.int64())}).replace_schema_metadata(metadata)
        parquet.write_table(table, folder / f"train-{number:05d}-of-00002.parquet", row_group_size=3)
    return folder


def members_of(folder: Path, ending: str) -> dict[str, bytes]:
    """The members with this ending by key, as Python's tarfile reads them."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                if info.name.endswith(f".{ending}"):
                    file = tar.extractfile(info)
                    assert file is not None
                    found[info.name.removesuffix(f".{ending}")] = file.read()
    return found
