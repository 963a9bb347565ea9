"""Tests of sret_scale/model."""
