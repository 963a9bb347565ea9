"""Shard sets on servers: opened, fetched and cached on the node."""
