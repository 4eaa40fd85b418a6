"""Rounds over rows until the intervals are tight."""
