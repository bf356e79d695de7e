"""Orbits on disk to batches."""
