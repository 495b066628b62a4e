"""What humans ask of models and machines: what a checkpoint is, whether it fits, what would run it."""
