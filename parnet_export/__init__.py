"""Fuse, export and split trained multi-stream convolutional networks."""

__version__ = "0.1.0"
