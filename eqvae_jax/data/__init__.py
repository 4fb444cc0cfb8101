"""Images in: sources of examples, their decoding and cropping, batches, and the preparation of shards."""
