"""What a training step will need of a machine that is not here: its programs rehearsed, counted and timed."""
