"""Tensors recorded from the release, and the code that compares ours with them."""

# Files of fixtures; suites.py has the check of each.
NAMES = ("cameras", "mv_unet", "lgm", "render", "ply", "sampler", "sampler_system", "train_step")
