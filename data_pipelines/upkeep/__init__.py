"""What is done with finished shards: facts, pictures, repair, files for other readers, an index of foreign ones."""
