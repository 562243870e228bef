"""Floor 0: graphs. Capture, contract, pipeline, hoist, lowering and artifacts."""
