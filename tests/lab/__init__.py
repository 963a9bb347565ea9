"""Tests of sret_scale/lab."""
