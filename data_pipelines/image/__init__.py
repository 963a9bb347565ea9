"""Bytes to pixels: decoding, views, augmentation, normalisation."""
