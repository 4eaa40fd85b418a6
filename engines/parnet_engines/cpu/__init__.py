"""Lanes on the cores of a CPU."""
