"""Puzzles on a grid that are made, not collected: an image, a label for every pixel, and what makes a pixel hard."""
