"""Predictions for other numbers of devices and other networks."""
