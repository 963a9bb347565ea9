"""What a grid task computes, one token at a time: its loss, its counts and the numbers made of them."""

import math

import torch
from torch import Tensor


def slow_loss(scores_BCHW: Tensor, label_BHW: Tensor, attribute_BHW: Tensor, *, most: float) -> float:
    """Mean cross-entropy of the tokens with a label whose attribute is at most `most`, or none (65535)."""
    losses = []
    for place in torch.cartesian_prod(*(torch.arange(size) for size in label_BHW.shape)).tolist():
        image, row, column = place
        label, attribute = int(label_BHW[image, row, column]), int(attribute_BHW[image, row, column])
        if label != 255 and (attribute <= most or attribute == 65535):
            losses.append(-scores_BCHW[image, :, row, column].double().log_softmax(0)[label].item())
    return sum(losses) / max(1, len(losses))


def slow_numbers(scores_BCHW: Tensor, label_BHW: Tensor, attribute_BHW: Tensor) -> dict[str, float]:
    """Exact match, balanced accuracy, loss, and the accuracy of the tokens of each power of two of the attribute."""
    num_classes = scores_BCHW.shape[1]
    tokens = [
        (image, int(label), int(scores.argmax()), int(attribute))
        for image in range(len(label_BHW))
        for label, scores, attribute in zip(
            label_BHW[image].flatten(),
            scores_BCHW[image].flatten(1).unbind(1),
            attribute_BHW[image].flatten(),
            strict=True,
        )
        if label != 255
    ]
    wrong = {image for image, label, said, _ in tokens if label != said}
    recalls = [mean(said == label for _, label, said, _ in tokens if label == c) for c in range(num_classes)]
    bins: dict[str, list[bool]] = {}
    for _, label, said, value in tokens:
        low = 2 ** int(math.log2(value)) if value > 1 else 0
        name = "distance_none" if value == 65535 else f"distance_{low}_{max(1, 2 * low - 1)}"
        bins.setdefault(name, []).append(label == said)
    return {
        "exact": 1 - len(wrong) / len(label_BHW),
        "balanced": mean(recall for recall in recalls if recall is not None),
        "loss": slow_loss(scores_BCHW, label_BHW, attribute_BHW, most=math.inf),
        **{name: mean(values) for name, values in bins.items()},
    }


def mean(values):  # type: ignore[no-untyped-def]
    listed = list(values)
    return sum(listed) / len(listed) if listed else None
