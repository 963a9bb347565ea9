"""Real images and texts that ship with the project, so that demos and tests need no download."""
