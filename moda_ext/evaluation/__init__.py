"""Judging a model by its answers."""
