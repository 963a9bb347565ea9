"""Programs that ranks of tests run."""
