"""Tests of sret_scale/launch and launch.sh."""
