"""From noise to latents: the network of DiT and SiT, and the processes it is trained and sampled by."""
