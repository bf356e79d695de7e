"""The training loop, its checkpoints and logs."""
