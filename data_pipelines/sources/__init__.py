"""Where images and labels come from: one module a kind, each with `list_samples` and a reader of bytes."""
