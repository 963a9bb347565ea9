"""Clusters on one machine, for tests of the launcher that a single host cannot do."""
