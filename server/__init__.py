"""Floor 3: HTTP in, SSE out, and the command line."""
