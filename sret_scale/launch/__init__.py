"""From a command to ranks on nodes: checks before the start, the launcher, the agent of a node, the first code of a rank."""
