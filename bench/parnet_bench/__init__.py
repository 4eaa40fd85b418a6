"""Measure latency so that the numbers hold up."""
