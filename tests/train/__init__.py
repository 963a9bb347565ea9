"""Tests of sret_scale/train and config."""
