"""A teacher's answer for one view as a record of fixed size, and a file of such records: see docs/soft_labels.md.

    log_probs_BC, views_B5 -> encode_records -> render_file -> bytes -> parse_file -> decode_records -> log_probs_BC

No pickle, little-endian, and every byte is covered by a checksum. Shapes: B batch, C classes, K classes that are kept.
"""

import json
import struct
import zlib
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from torch import Tensor
from typing_extensions import TypedDict

from data_pipelines.checked_files import parse_checked
from data_pipelines.image.upload import uploaded

MAGIC = b"SRETSOFT"
VERSION = 1
# magic, version, bytes of the JSON header, CRC-32 of the JSON header
_PREFIX = struct.Struct("<8sIII")
# Records begin at a multiple of this, so that a mapped file's fields need no shifting.
_ALIGNMENT = 64
MAX_CLASSES = 1 << 16

_Count = Annotated[int, Field(ge=0, lt=1 << 32)]


class FileHeader(TypedDict):
    """What a file says of its records; the sums are of `coverage_sums`."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    plan_sha256: str
    num_samples: _Count
    record_bytes: _Count
    view_crc32: list[_Count]
    coverage_sums: dict[str, int | float]


Records = NDArray[np.void]


def record_dtype(top_k: int) -> np.dtype[np.void]:
    """11 + 4 K bytes: box (top, left, height, width), flip, ids by falling probability p, ln p, ln of what is left."""
    return np.dtype(
        [
            ("box", "<u2", (4,)),
            ("flip", "u1"),
            ("ids", "<u2", (top_k,)),
            ("log_probs", "<f2", (top_k,)),
            ("log_rest", "<f2"),
        ]
    )


def encode_records(log_probs_BC: Tensor, views_B5: NDArray[np.int64], top_k: int) -> Records:
    """Records of B answers. Equal probabilities keep the order of their ids, so the bytes depend on nothing else."""
    num_classes = log_probs_BC.shape[1]
    assert 1 <= top_k <= num_classes <= MAX_CLASSES and len(views_B5) == len(log_probs_BC)
    if views_B5.min(initial=0) < 0 or views_B5.max(initial=0) > np.iinfo(np.uint16).max:
        raise ValueError(f"soft labels hold boxes in images of up to 65,535 pixels a side, got {views_B5.max()}")
    sorted_BC, ids_BC = torch.sort(log_probs_BC.float(), dim=1, descending=True, stable=True)
    # The rest is summed from its own classes: 1 minus the kept mass would lose it to rounding.
    log_rest_B = torch.logsumexp(sorted_BC[:, top_k:], dim=1)
    records = np.zeros(len(views_B5), record_dtype(top_k))
    records["box"], records["flip"] = views_B5[:, :4], views_B5[:, 4]
    records["ids"] = ids_BC[:, :top_k].cpu().numpy()
    records["log_probs"] = sorted_BC[:, :top_k].half().cpu().numpy()
    records["log_rest"] = log_rest_B.half().cpu().numpy()
    return records


def decode_records(records: Records, num_classes: int, device: torch.device | str = "cpu") -> Tensor:
    """Probabilities (B, C) in fp32 that sum to 1: what was not kept is spread evenly, as FKD does (arXiv 2112.01528).

    Renormalised, because the rounded parts may sum to a little more or less than 1. Only the records go to the device.
    """
    top_k = records.dtype["ids"].shape[0]
    # Fields of packed records are not aligned, which torch cannot read: they are copied out.
    ids_BK = uploaded(torch.from_numpy(records["ids"].astype(np.int32)), device).long()
    kept_BK = uploaded(torch.from_numpy(records["log_probs"].copy()), device).float().exp()
    rest_B1 = uploaded(torch.from_numpy(records["log_rest"][:, None].copy()), device).float().exp()
    if top_k == num_classes:
        rest_B1 = torch.zeros_like(rest_B1)
    total_B1 = kept_BK.sum(dim=1, keepdim=True) + rest_B1
    probs_BC = (rest_B1 / total_B1 / max(num_classes - top_k, 1)).repeat(1, num_classes)
    return probs_BC.scatter_(1, ids_BK, kept_BK / total_B1)


def coverage_sums(log_probs_BC: Tensor, records: Records, labels_B: Tensor) -> dict[str, float]:
    """Sums over the batch of what a store reports: how much of the teacher its records keep.

    `mass` is the probability of the kept classes, `kl` that of the teacher from its record (nats), `entropy` the
    teacher's (nats), `top1_agreement` the number of images whose label the teacher names, `gradient_cosine` the cosine
    between the gradients that the record and the whole answer give to the logits of an untrained student, which finds
    all classes equally likely. `views` counts the rows.
    """
    device = log_probs_BC.device
    log_p_BC = log_probs_BC.double()
    p_BC = log_p_BC.exp()
    # Below the smallest fp32 number a stored probability is 0, where the logarithm would be infinite.
    q_BC = decode_records(records, p_BC.shape[1], device).double()
    log_q_BC = q_BC.clamp_min(1e-45).log()
    gradients = (1 / p_BC.shape[1] - p_BC, 1 / p_BC.shape[1] - q_BC)
    ids_BK = torch.from_numpy(records["ids"].astype(np.int64)).to(device)
    return {
        "views": float(len(records)),
        "mass": float(p_BC.gather(1, ids_BK).sum()),
        "kl": float((p_BC * (log_p_BC - log_q_BC)).sum()),
        "entropy": float(-(p_BC * log_p_BC).sum()),
        "top1_agreement": float((ids_BK[:, 0] == labels_B.to(device)).sum()),
        "gradient_cosine": float(F.cosine_similarity(*gradients).sum()),
    }


def describe_coverage(coverage: Mapping[str, float]) -> str:
    """One line for people about the means of these sums. Early stores do not have the cosine."""
    cosine = coverage.get("gradient_cosine")
    return (
        f"{coverage['mass']:.1%} of the mass kept, KL {coverage['kl']:.4f} of entropy {coverage['entropy']:.3f} nats, "
        f"{'' if cosine is None else f'cosine to the full gradient {cosine:.4f}, '}"
        f"top-1 is the label for {coverage['top1_agreement']:.1%}"
    )


def record_views(records: Records) -> NDArray[np.int64]:
    """Views (B, 5) of records: top, left, height, width, flip."""
    return np.concatenate([records["box"], records["flip"][:, None]], axis=1).astype(np.int64)


def render_file(header: Mapping[str, Any], records_VN: Records) -> bytes:
    """The bytes of a file of V views of N samples. Adds the records' shape and checksums to the header."""
    header = {
        **header,
        "num_samples": records_VN.shape[1],
        "record_bytes": records_VN.dtype.itemsize,
        "view_crc32": [zlib.crc32(records_N.tobytes()) for records_N in records_VN],
    }
    text = json.dumps(header, sort_keys=True).encode("ascii")
    text += b" " * (-(_PREFIX.size + len(text)) % _ALIGNMENT)
    return _PREFIX.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text + records_VN.tobytes()


def parse_header(data: bytes, size_bytes: int) -> tuple[dict[str, Any], int]:
    """(header, offset of the records) of a file that begins with `data` and has `size_bytes`.

    Raises ValueError with the reason when the file is not one of these, or was cut off or changed.
    """
    if len(data) < _PREFIX.size or not data.startswith(MAGIC):
        raise ValueError("not a file of soft labels")
    _, version, header_bytes, crc = _PREFIX.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"format version {version}, expected {VERSION}")
    offset = _PREFIX.size + header_bytes
    text = data[_PREFIX.size : offset]
    if len(text) != header_bytes or zlib.crc32(text) != crc:
        raise ValueError("its header is cut off or was changed")
    header: dict[str, Any] = dict(parse_checked(text, FileHeader, "its header"))
    expected = offset + len(header["view_crc32"]) * header["num_samples"] * header["record_bytes"]
    if size_bytes != expected:
        raise ValueError(f"{size_bytes:,} bytes, expected {expected:,}: cut off or appended to")
    return header, offset
