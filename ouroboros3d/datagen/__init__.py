"""Meshes to orbits; nothing else of the package imports it."""
