"""What a run learns: the seam between the machine, which knows depth, memory and ranks, and its inputs and losses."""
