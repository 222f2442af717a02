"""Random bits as a function of seed, step, path and element."""
