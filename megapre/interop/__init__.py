"""Weights in from and out to other programs."""
