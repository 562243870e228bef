"""Floor 2: sequences, blocks, batches, steps and workers."""
