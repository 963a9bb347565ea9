"""Soft labels on disk: what a record keeps, and files that notice every change."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipelines.labels.records import (
    Records,
    coverage_sums,
    decode_records,
    encode_records,
    parse_header,
    record_dtype,
    record_views,
    render_file,
)
from sret_scale.distill import soft_loss
from tests.reference import soft_labels as twin


def random_log_probs(batch: int, classes: int, sharpness: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(batch, classes, generator=generator)).log_softmax(-1)


def views_of(batch: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    return np.array([[row, row + 1, 300 + row, 65535, row % 2] for row in range(batch)])


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 4),
    classes=st.integers(2, 40),
    sharpness=st.floats(0, 30),
    seed=st.integers(0, 10_000),
    data=st.data(),
)
def test_record_keeps_views_and_the_largest_probabilities(
    batch: int, classes: int, sharpness: float, seed: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, classes))
    log_probs = random_log_probs(batch, classes, sharpness, seed)
    records = encode_records(log_probs, views_of(batch), top_k)
    assert records.dtype.itemsize == 11 + 4 * top_k
    assert np.array_equal(record_views(records), views_of(batch))
    probs = decode_records(records, classes)
    torch.testing.assert_close(probs.sum(-1), torch.ones(batch))
    # A rounded logarithm is off by 2^-11 of itself, so a probability by p |ln p| 2^-11, and 2^-11 more when scaled.
    expected = torch.tensor(twin.keep_largest(log_probs.exp().tolist(), top_k))
    torch.testing.assert_close(probs, expected, atol=1.2e-3, rtol=0)


@settings(max_examples=50, deadline=None)
@given(
    classes=st.integers(2, 60),
    sharpness=st.floats(0.1, 8),
    student=st.floats(0, 5),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_loss_moves_by_the_kl_of_the_record_and_at_most_the_bound(
    classes: int, sharpness: float, student: float, seed: int, data: st.DataObject
) -> None:
    """L(p) - L(q) = KL(p || q) - sum over the rest of (p - u) ln s, which is at most sqrt(2 r KL) range(ln s) / 2."""
    top_k = data.draw(st.integers(1, classes))
    log_p = random_log_probs(1, classes, sharpness, seed)
    records = encode_records(log_p, views_of(1), top_k)
    q = decode_records(records, classes)
    log_s = random_log_probs(1, classes, student, seed + 1000)
    difference = float(soft_loss(log_s, log_p) - soft_loss(log_s, q.log()))
    sums = coverage_sums(log_p, records, torch.zeros(1, dtype=torch.int64))
    kept = set(records["ids"][0].tolist())
    left = [float(log_s[0, c]) for c in range(classes) if c not in kept] or [0.0]
    spread = max(left) - min(left)
    bound = (2 * max(0.0, 1 - sums["mass"]) * max(0.0, sums["kl"])) ** 0.5 * spread / 2
    # What rounding to half precision moves among the kept classes.
    rounding = 2**-10 * (1 + math.log(classes)) * (1 + float(log_s.max() - log_s.min()))
    assert abs(difference - sums["kl"]) <= bound + rounding


def test_bytes_of_a_record_are_those_of_the_format_page() -> None:
    records = encode_records(torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log(), np.array([[1, 2, 3, 258, 1]]), 2)
    box_and_flip = bytes([1, 0, 2, 0, 3, 0, 2, 1, 1])
    ids = bytes([1, 0, 0, 0])
    log_probs = np.log(np.array([0.5, 0.25])).astype("<f2").tobytes()
    log_rest = np.log(np.array([0.25])).astype("<f2").tobytes()
    assert records.tobytes() == box_and_flip + ids + log_probs + log_rest
    assert record_dtype(10).itemsize == 51


def test_equal_probabilities_keep_the_order_of_their_ids() -> None:
    records = encode_records(torch.zeros(1, 50).log_softmax(-1), views_of(1), 7)
    assert records["ids"][0].tolist() == list(range(7))


def test_all_classes_give_the_teacher_back_within_half_precision() -> None:
    log_probs = random_log_probs(64, 10, 3.0, 0)
    probs = decode_records(encode_records(log_probs, views_of(64), 10), 10)
    torch.testing.assert_close(probs, log_probs.exp(), atol=4e-4, rtol=0)


def test_impossible_classes_stay_impossible() -> None:
    log_probs = torch.tensor([[0.0, -200.0, -300.0]])
    probs = decode_records(encode_records(log_probs, views_of(1), 2), 3)
    assert probs.tolist() == [[1.0, 0.0, 0.0]]


def test_coverage_equals_its_twin() -> None:
    log_probs = random_log_probs(5, 12, 2.0, 1)
    records = encode_records(log_probs, views_of(5), 4)
    labels = torch.tensor([int(log_probs[0].argmax()), 0, 1, 2, 3])
    sums = coverage_sums(log_probs, records, labels)
    expected = twin.coverage(log_probs.exp().tolist(), decode_records(records, 12).tolist(), labels.tolist(), 4)
    assert sums == pytest.approx(expected, rel=1e-5)


def test_boxes_of_huge_images_are_refused() -> None:
    with pytest.raises(ValueError, match="up to 65,535 pixels a side, got 70000"):
        encode_records(torch.zeros(1, 3), np.array([[0, 0, 70000, 5, 0]]), 1)


def small_file() -> tuple[bytes, Records]:
    records = encode_records(random_log_probs(6, 5, 1.0, 3), views_of(6), 2).reshape(2, 3)
    return render_file({"plan_sha256": "0" * 64, "coverage_sums": {}}, records), records


def test_file_gives_its_records_back() -> None:
    data, records = small_file()
    header, offset = parse_header(data, len(data))
    assert offset % 64 == 0 and header["num_samples"] == 3 and len(header["view_crc32"]) == 2
    assert np.array_equal(np.frombuffer(data[offset:], records.dtype).reshape(2, 3), records)


@settings(max_examples=50, deadline=None)
@given(cut=st.integers(0, 10_000), flip=st.integers(0, 80_000))
def test_cut_file_and_flipped_header_are_noticed(cut: int, flip: int) -> None:
    data, _ = small_file()
    shorter = data[: cut % len(data)]
    with pytest.raises(ValueError, match=r"soft labels|version|header|bytes"):
        parse_header(shorter, len(shorter))
    _, offset = parse_header(data, len(data))
    bit = flip % (8 * offset)
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match=r"soft labels|version|header|bytes"):
        parse_header(bytes(flipped), len(flipped))


def test_another_version_is_refused() -> None:
    data = bytearray(small_file()[0])
    data[8] = 2
    with pytest.raises(ValueError, match="format version 2, expected 1"):
        parse_header(bytes(data), len(data))


def test_format_page_names_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs/soft_labels.md").read_text()
    data, _ = small_file()
    header, _ = parse_header(data, len(data))
    assert all(f"`{name}`" in page for name in [*header, *(record_dtype(1).names or ())])
    assert json.loads(json.dumps(header)) == header
