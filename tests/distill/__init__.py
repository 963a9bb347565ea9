"""Tests of sret_scale/distill."""
