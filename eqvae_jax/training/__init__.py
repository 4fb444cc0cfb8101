"""Training that knows nothing about images: state, optimizer, sharding, checkpoints, logging, loop."""
