"""Meshes to orbits. Only the commands import it."""
