"""From shards to batches: who reads what, in which order, and what happens to a bad sample."""
