"""Floor 2: one engine over several ranks, each a process with its part of the model."""
