"""Scores of a model against orbits, with intervals."""
