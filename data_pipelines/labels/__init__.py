"""Stored soft labels: records of fixed size, and a folder of them."""
