"""Text: documents cut into windows of bytes, each a sample."""
