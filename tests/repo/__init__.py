"""Tests of what holds for the whole repository."""
