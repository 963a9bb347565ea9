"""What `sret-scale doctor` looks at, on this machine and on all nodes together."""
