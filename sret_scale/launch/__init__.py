"""From a command to ranks on nodes: checks before the start, launcher, agent of a node, first code of a rank."""
