"""How sources become shards: plan, records, shards one by one, and the joining of them at the end."""
