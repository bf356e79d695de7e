"""Tensors recorded from the release, and the code that compares ours with them."""
