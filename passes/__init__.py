"""Floor 1: graph rewrites, one idea a file."""
