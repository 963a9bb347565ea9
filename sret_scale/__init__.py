"""Sliced Recursive Transformers of 100 to 1000 and more block applications, on DeepSpeed."""

__version__ = "0.1.0"
