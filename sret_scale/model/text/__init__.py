"""The language model: bytes in, and how surprising each next byte is."""
