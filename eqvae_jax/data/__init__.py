"""Images in: sources of examples, their decoding and cropping, batches, shards; and caches of their latents."""
