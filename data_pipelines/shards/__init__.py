"""The format of a shard set: tars, index and manifest, and what they are made of."""
