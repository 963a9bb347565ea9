"""Real images that ship with the project, so that the demo and the tests need no download."""
