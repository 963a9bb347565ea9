"""The configuration of a run: its dataclasses, the way from text to them, recipes, DeepSpeed's files."""
