"""Tests of sret_scale/memory."""
