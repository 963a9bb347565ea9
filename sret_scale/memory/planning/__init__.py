"""What a schedule costs, and the choice of one: measured on fake tensors, without a device."""
