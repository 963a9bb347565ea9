"""Tools that people run: fault suite, parity matrix and parity with the published code."""
