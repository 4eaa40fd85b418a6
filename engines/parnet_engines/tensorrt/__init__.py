"""Engines built by TensorRT and TensorRT-RTX, and the files they are kept in."""
