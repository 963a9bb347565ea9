"""The small compiled library behind `image`: optional, the same pixels without it."""
