"""Lanes on CUDA streams of one or several GPUs."""
