"""Checkpoints of 4 and 8 bits per weight out of such in 16, layer by layer."""
